"""The command line: parse, call `compiler` or `runtime`, print, exit code.

main           the command group
command        click's commands with sections, examples and hints
hints          what other tools call it
options        flags that several commands share, and how commands print
completion     what a shell offers behind an option
failures       exceptions as one line, an exit code, and JSON
engine_flags   flags of the backends' options
flags          flags by name → profile and request; `lemica_trt.build`
build          `build`, its stages one by one, `shape`, `methods`, `doctor`
bundle         `verify`, `report`, `run`, `inspect`, `sign`
measure        `bench`, `compare`
trace          `models`, `trace`
endpoint       `serve`
hub            `push`, `pull`
serve          `triton`, `client`
"""
