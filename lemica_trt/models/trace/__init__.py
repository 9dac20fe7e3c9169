"""Any diffusers pipeline, traced: its own `__call__` is run a few times, and its loop read from the recordings.

    arguments   what the pipeline is called with
    tape        a recording: aten operators between calls of components
    program     recording → one program a step, cut at `scheduler.step`
    decoded     the size that a pipeline decodes
    runs        calls of a pipeline that differ in one thing each
    slots       programs of several runs → what each slot is: constant, column, condition, guidance
    named       slots of all kinds of steps, by name
    replay      a trace run again for another request: the check that every trace ends with
    symbols     what a tensor is, said without its numbers
    trunk       the blocks of a transformer, left out without rewriting a forward
    body        the program of a step as a module, with or without the trunk
    pictures    how a pipeline makes tensors of the picture that it is given
    noise       how a pipeline's call takes initial latents
    ends        what stands before and behind the loop, as modules
    tracing     all of these → `ir.trace.Trace`

No line knows a family. What cannot be told is refused, by the name of the slot and of the operator.
"""

from lemica_trt.models.trace.tracing import trace_pipeline

__all__ = ["trace_pipeline"]
