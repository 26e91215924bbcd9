"""Names inside a deployable, as the Hugging Face hub spells them, and inside its decoder's metadata."""

ENCODER = "encoder_model.onnx"
DECODER = "decoder_model_merged.onnx"
STATIC_DECODE = "decoder_static_step.onnx"
CROSS_CACHE = "decoder_cross_cache.onnx"
VERDICT, MANIFEST = "verdict.json", "manifest.json"
CERTIFICATE, CERTIFICATE_PAGE = "certificate.json", "certificate.html"

FLAG = "accel.flag"  # metadata: name of the boolean input that chooses the branch
CACHE = "accel.cache"  # metadata: JSON, cache input -> the output that becomes it at the next step

POSITION = "position"  # input of a static step, int64 scalar: tokens in the caches, which is where new ones go
BUCKET = "bucket"  # axis of a static step: tokens that its caches have room for
