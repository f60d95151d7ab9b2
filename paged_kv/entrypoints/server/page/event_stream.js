/** Server-sent events from a stream of bytes. Knows lines, never what they say. */

/**
 * The data of each event, as text. Bytes may come cut anywhere, also within a letter; what is left
 * of the stream when nobody wants more is cancelled.
 */
export async function* eventsOf(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a \n may follow a last \r
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice("data:".length).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed already
  }
}
