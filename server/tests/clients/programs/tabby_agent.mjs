// Drives a Tandem server with the package that Tabby's plug-ins talk through: tabby_agent.mjs URL KEY demo|scripted
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.PACKAGES}/`);
const { TabbyAgent } = require("tabby-agent");

const [url, key, mode] = process.argv.slice(2);
const text = "def add(a, b):\n    return \n\n\nprint(add(1, 2))\n";

async function agentWith(token) {
  const agent = new TabbyAgent();
  await agent.initialize({
    config: { server: { endpoint: url, token }, anonymousUsageTracking: { disable: true } },
    clientProperties: { user: {}, session: {} },
  });
  return agent;
}

async function complete(agent) {
  const position = text.indexOf("return ") + "return ".length;
  const request = { filepath: "add.py", language: "python", text, position, manually: true };
  return agent.provideCompletions(request);
}

async function demo() {
  const agent = await agentWith(key);
  assert.equal(agent.getStatus(), "ready");
  assert(agent.getServerHealthState().version.git_describe.startsWith("tandem"));
  const answer = await complete(agent);
  // What the plug-in's own filters leave of the choices is theirs.
  assert.match(answer.id, /^cmpl-/, JSON.stringify(answer));
  assert(Array.isArray(answer.choices), JSON.stringify(answer));
  await agent.postEvent({ type: "view", completion_id: answer.id, choice_index: 0, view_id: "view" });
  await agent.finalize();
  const stranger = await agentWith("wrong");
  assert.equal(stranger.getStatus(), "unauthorized");
  await stranger.finalize();
}

// Completions call no tools.
async function scripted() {}

await { demo, scripted }[mode]();
console.log(`ok   tabby-agent, ${mode}`);
process.exit(0);
