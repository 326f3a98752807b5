"""The page of the server: a prompt, sampling controls, streamed text with probabilities."""

from collections.abc import Sequence

from cs_lm.reports.page import escaped, page

_STYLE = """\
textarea { width: 100%; min-height: 7rem; font: inherit; padding: .6rem; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
.controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .6rem; margin: .8rem 0; }
label { display: block; font-size: .85rem; color: var(--dim); }
input, select { width: 100%; font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 4px; padding: .25rem .4rem; }
button { font: inherit; padding: .4rem 1.2rem; border-radius: 6px; border: 0; cursor: pointer;
  background: var(--accent); color: var(--paper); }
button[disabled] { opacity: .4; cursor: default; } #stop { background: var(--second); }
#out { min-height: 8rem; margin-top: .8rem; } #out .given { color: var(--dim); }
#out span[tabindex]:hover, #out span[tabindex]:focus { outline: 2px solid var(--accent); }
.p0 { background: rgba(250, 82, 82, .45); } .p1 { background: rgba(255, 146, 43, .35); }
.p2 { background: rgba(255, 212, 59, .25); }
#tip { position: fixed; display: none; pointer-events: none; background: var(--ink);
  color: var(--paper); padding: .4rem .6rem; border-radius: 6px; font-size: .85rem;
  white-space: pre; font-family: ui-monospace, monospace; z-index: 1; max-width: 95vw; }
#state { min-height: 1.5em; } #state.bad { color: var(--second); }
"""

_BODY = """\
<p class="dim">Text goes on where your prompt ends. Colours: red tokens were unlikely. Point at a
token for its probability and the alternatives.</p>
<form id="form">
<label for="prompt">Prompt</label>
<textarea id="prompt" autofocus>Once upon a time</textarea>
<div class="controls">
<div><label for="model">model</label><select id="model">MODELS</select></div>
<div><label for="max_tokens">new tokens</label>
<input id="max_tokens" type="number" min="1" value="100"></div>
<div><label for="temperature">temperature</label>
<input id="temperature" type="number" min="0" max="2" step="0.05" value="0.8"></div>
<div><label for="top_k">top-k (empty: off)</label><input id="top_k" type="number" min="1"></div>
<div><label for="top_p">top-p</label>
<input id="top_p" type="number" min="0" max="1" step="0.01" value="0.95"></div>
<div><label for="min_p">min-p (0: off)</label>
<input id="min_p" type="number" min="0" max="1" step="0.01" value="0"></div>
<div><label for="repetition_penalty">repetition penalty</label>
<input id="repetition_penalty" type="number" min="0.1" step="0.05" value="1"></div>
<div><label for="seed">seed (empty: any)</label><input id="seed" type="number"></div>
<div><label for="end">stop text</label><input id="end"></div>
<div id="key_field" hidden><label for="key">API key</label>
<input id="key" type="password" autocomplete="off"></div>
</div>
<button id="go">Generate</button> <button id="stop" type="button" disabled>Stop</button>
</form>
<p id="state" class="dim" role="status"></p>
<div id="out" class="text" aria-live="off"></div>
<div id="tip"></div>
"""

_SCRIPT = """\
const $ = (id) => document.getElementById(id);
const out = $("out"), tip = $("tip"), state = $("state");
let controller = null;

function say(text, bad) { state.textContent = text; state.className = bad ? "bad" : "dim"; }

function addToken(text, logprob, top) {
  const span = document.createElement("span"), p = Math.exp(logprob);
  span.textContent = text;
  span.tabIndex = 0;
  span.className = p < 0.05 ? "p0" : p < 0.2 ? "p1" : p < 0.5 ? "p2" : "";
  const lines = [JSON.stringify(text) + "  " + (100 * p).toFixed(1) + " %"];
  const others = Object.entries(top || {}).sort((a, b) => b[1] - a[1]);
  for (const [token, lp] of others)
    lines.push("  " + JSON.stringify(token) + "  " + (100 * Math.exp(lp)).toFixed(1) + " %");
  span.dataset.tip = lines.join("\\n");
  out.append(span);
}

function showTip(event) {
  const span = event.target.closest && event.target.closest("[data-tip]");
  if (!span) { tip.style.display = "none"; return; }
  const box = span.getBoundingClientRect();
  tip.textContent = span.dataset.tip;
  tip.style.display = "block";
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  const below = box.bottom + 6;
  tip.style.top = (below + tip.offsetHeight < innerHeight ? below
    : Math.max(4, box.top - tip.offsetHeight - 6)) + "px";
}
for (const kind of ["pointerover", "pointerdown", "focusin"]) out.addEventListener(kind, showTip);
for (const kind of ["pointerleave", "focusout"])
  out.addEventListener(kind, () => { tip.style.display = "none"; });

function request() {
  const body = { model: $("model").value, prompt: $("prompt").value, stream: true, logprobs: 5,
    stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "seed"])
    if ($(name).value !== "") body[name] = Number($(name).value);
  if (body.min_p === 0) delete body.min_p;
  if ($("end").value) body.stop = [$("end").value.replaceAll("\\\\n", "\\n")];
  return body;
}

function take(record) {
  if (record.error) throw new Error(record.error.message);
  let reason = null;
  for (const choice of record.choices) {
    const found = choice.logprobs;
    // the text is final; a token's own bytes may be half a character
    if (found && found.tokens.length)
      addToken(choice.text, found.token_logprobs[0], found.top_logprobs[0]);
    else if (choice.text) out.append(choice.text);
    reason = choice.finish_reason || reason;
  }
  return { reason, usage: record.usage };
}

async function generate() {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const body = request(), start = performance.now();
  controller = new AbortController();
  const reply = await fetch("v1/completions",
    { method: "POST", headers, body: JSON.stringify(body), signal: controller.signal });
  if (!reply.ok) {
    if (reply.status === 401) $("key_field").hidden = false;
    const text = await reply.text();
    let message = text;
    try { message = JSON.parse(text).error.message; } catch (error) {}
    throw new Error(message);
  }
  out.replaceChildren();
  const given = document.createElement("span");
  given.className = "given";
  given.textContent = body.prompt;
  out.append(given);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", reason = null, usage = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\\n\\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const found = take(JSON.parse(data));
      reason = found.reason || reason;
      usage = found.usage || usage;
    }
  }
  const seconds = (performance.now() - start) / 1000;
  const tokens = usage ? usage.completion_tokens : 0;
  say(`${tokens} tokens in ${seconds.toFixed(2)} s (${(tokens / seconds).toFixed(0)} a second); `
    + (reason === "stop" ? "it ended by itself or at the stop text" : "the limit was reached"));
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (controller) return;
  $("go").disabled = true;
  $("stop").disabled = false;
  say("writing ...");
  try {
    await generate();
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(String(error.message || error), true);
  }
  controller = null;
  $("go").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => { if (controller) controller.abort(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
"""


def playground(models: Sequence[str], nonce: str) -> str:
    """The page; `nonce` allows its script under the server's content security policy."""
    options = "".join(f"<option>{escaped(name)}</option>" for name in models)
    text = page("cs_lm", _BODY.replace("MODELS", options), _STYLE, _SCRIPT)
    return text.replace("<script>", f'<script nonce="{nonce}">', 1)
