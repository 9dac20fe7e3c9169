"""Bundles and step plans on the Hugging Face hub, or in folders that are laid out like its repositories.

    places      a repository of the hub, or a folder: list, read, write as one change
    card        the README.md of a repository: what it holds, in tables made of its own values
    exchange    push and pull

A repository holds one bundle, as it is, with `manifest.json` at its root; or step plans, `plans/NAME.json`. Of a bundle
nothing is pulled that its digest does not cover.
"""
