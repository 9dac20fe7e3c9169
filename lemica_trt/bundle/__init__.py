"""The folder that is deployed: its format, reading it, writing it.

manifest   the format: what lies where, and the manifest that lists it
limits     bounds on the numbers of a manifest or plan from somewhere else
reading    `Bundle`: files are compared with the manifest before they are used
writing    a new bundle, plans added, copies; whole or not there
"""
