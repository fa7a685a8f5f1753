"""The documentation as a site: `make docs` builds it in .cache/site, and checks every link.

    docs/*.md, README.md ...  ->  source.py: one folder of pages, with the navigation
    the code                  ->  reference.py: pages that nobody writes by hand
    that folder               ->  Sphinx with conf.py, which takes every warning for an error
    the site                  ->  links.py: all links and anchors, and nothing from the network

The pages in docs/ are plain Markdown, and their links work on the forge as well.
navigation.toml lists them.
"""
