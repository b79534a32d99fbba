"""The documentation as a site: gather the pages, build them, and check what came out."""
