// The service: requests, and events as they come.

export class ServiceError extends Error {
  constructor(status, error, retryAfter) {
    super(error?.message ?? `the service answered ${status}`);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let key = sessionStorage.getItem("fewstep-key") ?? "";
let askForKey = async () => "";

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export async function call(path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (answer.status === 401) {
    key = await askForKey();
    if (key) {
      sessionStorage.setItem("fewstep-key", key);
      return call(path, body, signal);
    }
  }
  if (!answer.ok) {
    const found = await answer.json().catch(() => ({}));
    throw new ServiceError(answer.status, found.error, Number(answer.headers.get("retry-after")));
  }
  return answer;
}

export async function getJson(path) {
  return (await call(path)).json();
}

// Calls `onEvent` with every event of a stream of server-sent events.
export async function stream(path, body, onEvent, signal) {
  const answer = await call(path, { ...body, stream: true, progress: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      const line = frame.split("\n").find((one) => one.startsWith("data: "));
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServiceError(500, event.error);
      onEvent(event);
    }
  }
}

export function asCurl(path, body) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const head = key ? ` \\\n  -H "authorization: Bearer $FEWSTEP_KEY"` : "";
  return `curl ${quoted(location.origin + path)}${head} \\\n  -H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`;
}

export function asPython(path, body) {
  const python = JSON.stringify; // of texts, numbers and tables of these both languages write alike
  const open = `import base64\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${python(location.origin + "/v1")}, api_key=${key ? '"..."' : '"none"'})\n`;
  const write = (found) => `with open("picture.png", "wb") as file:\n    file.write(base64.b64decode(${found}))\n`;
  if (path === "/v1/images/generations") {
    const { prompt, n, ...extra } = body;
    const given = [`prompt=${python(prompt ?? "")}`, ...(n > 1 ? [`n=${n}`] : [])];
    return `${open}found = client.images.generate(${given.join(", ")}, extra_body=${python(extra)})\n${write("found.data[0].b64_json")}`;
  }
  return `${open}found = client.post(${python(path.replace("/v1", ""))}, body=${python(body)}, cast_to=object)\n${write('found["data"][0]["b64_json"]')}`;
}
