"""The command line: parse, call `compiler` or `runtime`, print, exit code.

main           the command group, and errors as one line
options        flags that several commands share, and how commands print
engine_flags   flags of the backends' options
flags          flags by name → profile and request; `lemica_trt.build`
build          `build`, its stages one by one, `methods`, `doctor`
bundle         `verify`, `report`, `run`, `inspect`
trace          `models`, `trace`
serve          `triton`, `client`
"""
