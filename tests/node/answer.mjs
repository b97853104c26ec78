// Loads an exported folder and answers one question about one image, as any user of
// transformers.js would. Prints what it read and what it wrote as JSON.
//
//     node answer.mjs FOLDER IMAGE QUESTION NEW_TOKENS [DTYPE]

import path from "node:path";
import {
  AutoModelForImageTextToText,
  AutoProcessor,
  RawImage,
  env,
} from "@huggingface/transformers";

const [folder, picture, question, count, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const name = path.basename(folder);

const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, dtype ? { dtype } : {});

const content = [{ type: "image" }, { type: "text", text: question }];
const prompt = processor.apply_chat_template([{ role: "user", content }], {
  add_generation_prompt: true,
});
const inputs = await processor(await RawImage.read(picture), prompt);
const written = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });

const read = inputs.input_ids.dims.at(-1);
console.log(
  JSON.stringify({
    prompt,
    input_ids: Array.from(inputs.input_ids.data, Number),
    pixels: Array.from(inputs.pixel_values.data),
    shape: inputs.pixel_values.dims,
    new_ids: Array.from(written.data, Number).slice(read),
    text: processor.batch_decode(written.slice(null, [read, null]), { skip_special_tokens: true })[0],
  }),
);
