"""Diagrams that are drawn from the code itself, as Mermaid."""
