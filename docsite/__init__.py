"""What makes docs/ a site, for MkDocs: see mkdocs.yml. Nothing here is part of the package."""
