"""Silence for other libraries' progress bars and advice, so that accel's own messages stand out."""

import logging
import warnings
from contextlib import suppress


def quiet() -> None:
    """Turn off other libraries' messages. For the command line only: a library must not change its host's settings."""
    import transformers

    with suppress(ImportError):  # a missing ONNX Runtime is reported later, by accel
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # errors are raised as exceptions as well
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|onnxscript\.|copyreg")
