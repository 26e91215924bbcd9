"""Keeps other libraries' progress bars and advice off the screen, so that a person sees what accel is doing."""

import logging
import warnings
from contextlib import suppress


def quiet() -> None:
    """For the command line only: a library must not change its host's settings."""
    import transformers

    with suppress(ImportError):  # a message of accel's own says so later
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # what goes wrong is raised as well
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|onnxscript\.|copyreg")
