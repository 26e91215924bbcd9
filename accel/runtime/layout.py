"""File names in a deployable's folder, as on the Hugging Face hub, and names in its decoders' metadata and graphs."""

ENCODER = "encoder_model.onnx"
DECODER = "decoder_model_merged.onnx"
STATIC_DECODE = "decoder_static_step.onnx"
CROSS_CACHE = "decoder_cross_cache.onnx"  # computes the cross-attention caches from the encoder's output
VERDICT, MANIFEST = "verdict.json", "manifest.json"
CERTIFICATE, CERTIFICATE_PAGE = "certificate.json", "certificate.html"

FLAG = "accel.flag"  # metadata key: name of the merged decoder's boolean input that selects the branch
POSITIONS = "accel.positions"  # metadata key: POSITIONS_FROM_MASK, or anything else for every token
POSITIONS_FROM_MASK = "mask"
CACHE = "accel.cache"  # metadata key: JSON, cache input -> the output that becomes it at the next decode step

POSITION = "position"  # input of static_decode, int64 scalar: tokens in the caches = where the new entries are written
BUCKET = "bucket"  # axis of static_decode: length of its caches, in tokens
