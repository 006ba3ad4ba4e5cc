/**
 * The formats that Prometheus reads: OpenMetrics, and the older one of text.
 *
 * @module
 */

/** A number, and what it is of. */
export interface Sample {
  /** What follows the name of its family. */
  readonly suffix?: string;
  /** What tells it from the others of its family. */
  readonly labels: Readonly<Record<string, string>>;
  /** The number. */
  readonly value: number;
}

/** Numbers of one kind; a counter's name does not have its end `_total`. */
export interface Family {
  /** Its name, which ends with its unit. */
  readonly name: string;
  /** What it is, in a sentence. */
  readonly help: string;
  /** How it may change. */
  readonly type: "counter" | "gauge" | "histogram";
  /** Its numbers. */
  readonly samples: readonly Sample[];
}

/** What stands for what would end a value of a label. */
const ESCAPES: Readonly<Record<string, string>> = {
  "\n": "\\n",
  '"': '\\"',
  "\\": "\\\\",
};

/**
 * A value of a label: what came from elsewhere ends neither it nor the line, and
 * controls no terminal.
 */
function quote(text: string): string {
  const escaped = text.toWellFormed()
    .replace(/["\\]|\p{Cc}/gu, (it) => ESCAPES[it] ?? " ");
  return `"${escaped}"`;
}

function formatSample(
  family: string,
  { suffix = "", labels, value }: Sample,
): string {
  const pairs = Object.entries(labels)
    .map(([name, text]) => `${name}=${quote(text)}`);
  const braces = pairs.length > 0 ? `{${pairs.join(",")}}` : "";
  return `${family}${suffix}${braces} ${value}`;
}

/** Writes families; those without a number are left out. */
export function formatMetrics(
  families: readonly Family[],
  format: "openmetrics" | "text",
): string {
  const lines = families.filter(({ samples }) => samples.length > 0)
    .flatMap(({ name, help, type, samples }) => {
      const full = type === "counter" ? `${name}_total` : name;
      const shown = format === "text" ? full : name;
      return [
        `# HELP ${shown} ${help}`,
        `# TYPE ${shown} ${type}`,
        ...samples.map((sample) => formatSample(full, sample)),
      ];
    });
  if (format === "openmetrics") lines.push("# EOF");
  return lines.map((line) => `${line}\n`).join("");
}
