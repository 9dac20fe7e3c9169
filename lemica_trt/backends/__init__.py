"""Engine libraries: one folder a vendor, its build half and its run half together.

A vendor is a folder here, found by listing; nothing else names it. It holds

    __init__    BACKENDS: backend name → its options, a subclass of `options.Options`
    build       BUILDERS: backend name → an object of the protocol `build.Builder`, and of `build.Quantizer` where the
                options have `quantize`; absent where nothing is built
    quantize    of ONNX Runtime: measures which layers to quantise, for all backends (`build.quantiser`)
    run         open_backend(key, settings): the run half, an object of the protocol `base.Backend`

    onnxruntime     `onnxruntime`: the ONNX files are the engine, with fused attention; CPU or CUDA
    openvino        `openvino`: the ONNX files are the engine; CPU
    tensorrt        `tensorrt`, on the GPU that the engine will run on; `tensorrt-rtx` (TensorRT for RTX), built on any
                    machine and finished for the GPU where it is first loaded
    torch           `torch`: PyTorch modules of the calling process, CPU or CUDA; nothing is built;
                    `branches`: the collective of two processes with a branch of the guidance each

Beside them lies what they share:

    base        the run half's protocols, and opening a backend
    build       the build half's protocol, and building with a backend
    options     backends by listing, and what follows from their options
    machine     the processor and the GPU of this machine
    qdq         linear layers of an ONNX graph in int8 or fp8, as TensorRT wants them
    onnx_file   what an ONNX file may ask for, checked before a library reads it
    onnx_weights  an ONNX file with weights changed, for libraries that load such files

Importing a folder's `__init__` costs nothing: the library itself is imported when something is built or run. The
backend is a value that travels in the manifest, never an environment variable: one process may hold two.
"""
