"""The folder that is deployed: its format, reading it, writing it; and the folder in which it is made.

manifest   the format: what lies where, and the manifest that lists it
limits     bounds on the numbers of a manifest or plan from somewhere else
signing    who made a bundle: signatures over its manifest, keys that are trusted
reading    `Bundle`: files are compared with the manifest before they are used
writing    a new bundle, plans added, copies; whole or not there
workspace  the work folder: what stages of a build have made, and records of it
reports    what lies there for people: report, kept clips
contents   what a bundle or a work folder knows of its calibration, as values
"""
