// Drives a Tandem server with Ollama's package for Node: ollama_node.mjs URL KEY demo|scripted
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.PACKAGES}/`);
const { Ollama } = require("ollama");

const [url, key, mode] = process.argv.slice(2);
const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
const task = "Read note.txt and tell me the password.";
const parameters = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const tools = [{ type: "function", function: { name: "read_file", description: "Reads a file", parameters } }];

async function demo() {
  const { models } = await client.list();
  assert(models.some((model) => model.name === "auto"), JSON.stringify(models));
  const shown = await client.show({ model: "deep" });
  assert(shown.model_info["tandem.context_length"] > 0);
  const options = { num_predict: 8, temperature: 0, seed: 7 };
  const messages = [{ role: "user", content: "Say hello." }];
  const answer = await client.chat({ model: "deep", messages, options });
  assert(answer.done && answer.eval_count <= 8);
  let text = "";
  for await (const part of await client.chat({ model: "deep", messages, options, stream: true })) {
    text += part.message.content;
  }
  assert.equal(text, answer.message.content);
  const gap = await client.generate({ model: "fast", prompt: "def add(a, b):\n    ", suffix: "\n", options });
  assert.equal(typeof gap.response, "string");
  await assert.rejects(client.chat({ model: "none", messages }), /none/);
}

async function scripted() {
  const messages = [{ role: "user", content: task }];
  const calls = [];
  for await (const part of await client.chat({ model: "auto", messages, tools, stream: true })) {
    calls.push(...(part.message.tool_calls ?? []));
  }
  assert.equal(calls.length, 1);
  assert.deepEqual(calls[0].function.arguments, { path: "note.txt" });
  messages.push({ role: "assistant", content: "", tool_calls: calls });
  messages.push({ role: "tool", tool_name: "read_file", content: "The password is pelican-4711." });
  const answer = await client.chat({ model: "auto", messages, tools });
  assert.match(answer.message.content, /pelican-4711/);
}

await { demo, scripted }[mode]();
console.log(`ok   ollama for Node, ${mode}`);
