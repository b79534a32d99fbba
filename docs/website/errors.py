"""What stops the build."""


class SiteError(Exception):
    """The site cannot be built or is not as it should be; the message says what and where."""
