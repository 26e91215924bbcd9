// Generate with Transformers.js: prints input ids and generated ids of each case as JSON.
// Arguments: the deployable's folder, a JSON file of cases, name -> {"texts" or "features", "options"}, and the dtype.
import { readFileSync } from 'node:fs';
import {
  AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Tensor, WhisperForConditionalGeneration, env,
} from '@huggingface/transformers';

env.allowRemoteModels = false;
const [folder, cases, dtype] = process.argv.slice(2);
const config = JSON.parse(readFileSync(`${folder}/config.json`));
let model_class = config.is_encoder_decoder ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
if (config.model_type === 'whisper') model_class = WhisperForConditionalGeneration;
const model = await model_class.from_pretrained(folder, { dtype });
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));
const results = {};
for (const [name, { texts, features, options }] of Object.entries(JSON.parse(readFileSync(cases)))) {
  let inputs;
  if (features) {
    const shape = [features.length, features[0].length, features[0][0].length];
    inputs = { inputs: new Tensor('float32', Float32Array.from(features.flat(2)), shape) };
    if (features.length > 1) { // by itself it begins one row only
      inputs.decoder_input_ids = features.map(() => [config.decoder_start_token_id]);
    }
  } else {
    const { input_ids, attention_mask } = tokenizer(texts, { padding: true });
    inputs = { input_ids, attention_mask };
  }
  let tokens = numbers(await model.generate({ ...inputs, ...options }));
  if (features) tokens = tokens.map((row) => row.slice(1)); // PyTorch's Whisper leaves out the start token
  results[name] = { inputs: texts ? numbers(inputs.input_ids) : null, tokens };
}
console.log(JSON.stringify(results));
