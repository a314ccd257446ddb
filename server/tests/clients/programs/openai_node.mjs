// Drives a Tandem server with the openai package for Node: openai_node.mjs URL KEY demo|scripted
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.PACKAGES}/`);
const OpenAI = require("openai").default;

const [url, apiKey, mode] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 120_000 });
const task = "Read note.txt and tell me the password.";
const parameters = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const tool = { name: "read_file", description: "Reads a file", parameters };

async function demo() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert(ids.includes("auto"), `${ids}`);
  const messages = [{ role: "user", content: "Say hello." }];
  const stream = await client.chat.completions.create({
    model: "fast", messages, max_tokens: 8, stream: true, stream_options: { include_usage: true },
  });
  let usage;
  for await (const chunk of stream) usage = chunk.usage ?? usage;
  assert(usage.completion_tokens <= 8);
  const completion = await client.completions.create({ model: "fast", prompt: "def ", suffix: "\n", max_tokens: 8 });
  assert.equal(typeof completion.choices[0].text, "string");
  const response = await client.responses.create({ model: "deep", input: "Say hello.", max_output_tokens: 8 });
  assert(["completed", "incomplete"].includes(response.status));
  await assert.rejects(client.chat.completions.create({ model: "none", messages }), OpenAI.NotFoundError);
}

async function scripted() {
  const messages = [{ role: "user", content: task }];
  const tools = [{ type: "function", function: tool }];
  const stream = client.chat.completions.stream({ model: "auto", messages, tools });
  const { message } = (await stream.finalChatCompletion()).choices[0];
  const [call] = message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { path: "note.txt" });
  messages.push(message, { role: "tool", tool_call_id: call.id, content: "The password is pelican-4711." });
  const answer = await client.chat.completions.create({ model: "auto", messages, tools });
  assert(answer.choices[0].message.content.includes("pelican-4711"));
}

await { demo, scripted }[mode]();
console.log(`ok   openai for Node, ${mode}`);
