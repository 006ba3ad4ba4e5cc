// Machine files that the evaluator in mod.ts leaves alone are evaluated here by
// the real Guix, once a change: what comes out is kept with the content of all
// that went in.

import { type ChildProcess, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { hostname } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";
import type {
  Machine,
  MachineFile,
  Plugin,
  PluginContext,
  Problem,
} from "../mod.ts";
import { sharedDirectory } from "./programs.ts";

/** How long Guile may take; the file may contain an endless loop. */
const timeout = 10_000;

/** How long it is left at that when Guile took too long. */
const patience = 600_000;

/** How much Guile may write: far more than 10,000 machines. */
const maximumOutput = 1 << 26;

/** Of how many machine files the outcome is kept. */
const maximumEntries = 16;

/** What an evaluation by Guile says, as `program` writes it. */
interface Outcome {
  /** Fields and place of the machines; absent where there is no such list. */
  readonly machines?: readonly {
    readonly fields: Record<string, unknown>;
    readonly place: string | null;
  }[];
  /** What is wrong with the file, and where if it is known. */
  readonly error?: {
    readonly message: string;
    readonly place: string | null;
    readonly variable: string | null;
  };
  /** Files that were opened or looked for. */
  readonly files: readonly string[];
  /** Files of modules that were loaded. */
  readonly modules: readonly string[];
  /** Environment variables that were asked for. */
  readonly variables: readonly string[];
  /** Whether it asked for the name of this host. */
  readonly host: boolean;
  /** Whether it ran programs or listed directories: never the same twice. */
  readonly volatile: boolean;
}

/** An outcome and what it was made from. */
interface Entry {
  readonly inputs: readonly (readonly [kind: string, name: string])[];
  readonly digests: readonly string[];
  readonly outcome: Outcome;
}

/**
 * What Guile runs, with the name of the machine file in `file`. It evaluates it
 * like the procedure `build-machines` of (guix scripts offload), in the same
 * module and with the same HOME, watches what is read meanwhile, and writes one
 * line: a record separator and JSON.
 */
const program = String.raw`
(use-modules (guix scripts offload) (guix diagnostics) (ice-9 match)
             (srfi srfi-1))

(define out (fdopen (dup->fdes 1) "w"))
(set-port-encoding! out "UTF-8")
(set-current-output-port (current-error-port))
(set-current-input-port (open-input-file "/dev/null"))
(false-if-exception (setrlimit 'as (expt 2 32) (expt 2 32)))
(false-if-exception (setenv "HOME" (passwd:dir (getpw (getuid)))))

(define files '())
(define modules '())
(define variables '())
(define host? #f)
(define volatile? #f)

(define (note-file! name . _)
  (when (string? name)
    (set! files (cons (if (string-prefix? "/" name)
                          name
                          (string-append (getcwd) "/" name))
                      files))))
(define (note-module! name . _)
  (set! modules (cons (%search-load-path name) modules)))
(define (note-variable! name . _)
  (set! variables (cons name variables)))
(define (note-host! . _) (set! host? #t))
(define (note-volatile! . _) (set! volatile? #t))

(define (watch module name note!)
  (let ((variable (module-variable module name)))
    (when variable
      (let ((original (variable-ref variable)))
        (variable-set! variable
                       (lambda args
                         (false-if-exception (apply note! args))
                         (apply original args)))))))

(define (watch-all names note!)
  (for-each (lambda (name) (watch the-root-module name note!)) names))

(define (escape char)
  (cond ((memv char '(#\" #\\)) (string #\\ char))
        ((char<? char #\space)
         (string-append "\\u" (string-pad (number->string (char->integer char)
                                                          16)
                                          4 #\0)))
        (else (string char))))

(define (json value)
  (match value
    (#t "true")
    (#f "false")
    ('null "null")
    ((? string?)
     (string-append "\"" (string-concatenate (map escape (string->list value)))
                    "\""))
    ((? exact-integer?) (number->string value))
    ((and (? real?) (not (? nan?)) (not (? inf?)))
     (number->string (exact->inexact value)))
    (#(pairs ...)
     (string-append "{" (string-join (map (match-lambda
                                            ((name . value)
                                             (string-append (json name) ":"
                                                            (json value))))
                                          pairs)
                                     ",")
                    "}"))
    ((items ...)
     (string-append "[" (string-join (map json items) ",") "]"))
    (_ (json (vector (cons "scheme" (object->string value)))))))

(define (plain value)
  (match value
    ((or (? string?) (? boolean?) (? real?)) value)
    ((items ...) (map plain items))
    (_ (vector (cons "scheme" (object->string value))))))

(define (machine->json machine)
  (let* ((type (struct-vtable machine))
         (fields (map (lambda (field)
                        (cons field ((record-accessor type field) machine)))
                      (record-type-fields type)))
         (location (assq-ref fields 'location)))
    (vector (cons "fields"
                  (list->vector
                   (filter-map (match-lambda
                                 (('location . _) #f)
                                 ((field . value)
                                  (cons (symbol->string field) (plain value))))
                               fields)))
            (cons "place" (if (location? location)
                              (location->string location)
                              'null)))))

(define (error->json message place variable)
  (vector (cons "error" (vector (cons "message" message)
                                (cons "place" (or place 'null))
                                (cons "variable" (or variable 'null))))))

(define (formatted procedure format-string args)
  (let ((message (if (and (string? format-string) (list? args))
                     (apply simple-format #f format-string args)
                     (object->string (list format-string args)))))
    (if procedure
        (simple-format #f "~a: ~a" procedure message)
        message)))

(define (report key . args)
  (match (cons key args)
    (('system-error _ _ ((? string? reason) (? string? name)) . _)
     (error->json (string-append "failed to open '" name "': " reason) #f #f))
    (('syntax-error _ (? string? message) properties . _)
     (error->json message
                  (let ((location (and properties
                                       (source-properties->location
                                        properties))))
                    (and location (location->string location)))
                  #f))
    (('read-error _ (? string? message) (args ...) . _)
     (error->json (formatted #f message args) "" #f))
    (('unbound-variable _ _ ((? symbol? name)) . _)
     (error->json (formatted #f "Unbound variable: ~a" (list name))
                  #f (symbol->string name)))
    (('quit . _)
     (error->json "the file ends the process" #f #f))
    ((_ procedure (? string? message) args . _)
     (error->json (formatted procedure message (or args '())) #f #f))
    (x (error->json (object->string x) #f #f))))

(define (evaluate)
  (catch #t
    (lambda ()
      (save-module-excursion
       (lambda ()
         (set-current-module (@@ (guix scripts offload) %user-module))
         (match (primitive-load file)
           (((? build-machine? machines) ...)
            (vector (cons "machines" (map machine->json machines))))
           (_ (vector))))))
    report))

(watch-all '(open-file open open-fdes stat access? primitive-load) note-file!)
(watch-all '(primitive-load-path) note-module!)
(watch-all '(getenv) note-variable!)
(watch-all '(gethostname uname) note-host!)
(watch-all '(primitive-fork system system* spawn opendir environ current-time
             gettimeofday)
           note-volatile!)
(watch (resolve-module '(ice-9 popen)) 'piped-process note-volatile!)

(let ((result (vector->list (evaluate))))
  (display (string-append
            "\x1e"
            (json (list->vector
                   (append result
                           (list (cons "files" (delete-duplicates files))
                                 (cons "modules"
                                       (filter string? modules))
                                 (cons "variables"
                                       (delete-duplicates variables))
                                 (cons "host" host?)
                                 (cons "volatile" volatile?)))))
            "\n")
           out)
  (force-output out)
  (primitive-exit 0))
`;

/** The outcome when Guile takes too long. */
const timedOut: Outcome = {
  error: {
    message: `no result after ${timeout / 1000} seconds: an endless loop?`,
    place: null,
    variable: null,
  },
  files: [],
  modules: [],
  variables: [],
  host: false,
  volatile: false,
};

/** Writes a string as Scheme reads it. */
function schemeString(text: string): string {
  return `"${text.replace(/[\\"]/g, "\\$&")}"`;
}

/** Kills a process, unless it has ended, and what it has started. */
function kill(child: ChildProcess): void {
  const { exitCode, pid, signalCode } = child;
  if (pid === undefined || exitCode !== null || signalCode !== null) return;
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    child.kill("SIGKILL");
  }
}

/** Runs `guix repl` with a program; gives what it writes, none after timeout. */
function runGuile(
  ctx: PluginContext,
  input: string,
): Promise<string | undefined> {
  return new Promise((resolve, reject) => {
    const child = spawn(ctx.guix, ["repl", "-t", "machine"], {
      // A process group of its own, to be killed with all that is in it.
      detached: true,
      env: { ...ctx.environment, GUILE_AUTO_COMPILE: "0" } as NodeJS.ProcessEnv,
    });
    let output = "";
    let errors = "";
    const finish = (end: () => void) => {
      clearTimeout(timer);
      ctx.signal.removeEventListener("abort", abort);
      kill(child);
      end();
    };
    const fail = (reason: string) => finish(() => reject(new Error(reason)));
    const abort = () => fail("interrupted");
    const timer = setTimeout(() => finish(() => resolve(undefined)), timeout);
    ctx.signal.addEventListener("abort", abort);
    if (ctx.signal.aborted) abort();
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      output += text;
      if (output.length > maximumOutput) fail("it writes too much");
    });
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      errors = (errors + text).slice(-4096);
    });
    child.stdin.on("error", () => {
      // It has ended early: 'close' says how.
    });
    child.on("error", (error) => fail(error.message));
    child.on("close", (code, signal) => {
      if (output.includes("\x1e")) finish(() => resolve(output));
      else fail(errors.trim() || `it ended with ${signal ?? `code ${code}`}`);
    });
    child.stdin.end(input);
  });
}

/** Has Guile evaluate a machine file. */
async function evaluate(ctx: PluginContext, file: string): Promise<Outcome> {
  const input = `(define file ${schemeString(file)})\n${program}`;
  const output = await runGuile(ctx, input);
  if (output === undefined) return timedOut;
  const start = output.indexOf("\x1e") + 1;
  return JSON.parse(output.slice(start, output.indexOf("\n", start)));
}

/** Finds a program the way a shell does. */
function findProgram(ctx: PluginContext): string {
  if (ctx.guix.includes("/")) return ctx.guix;
  const directories = (ctx.environment.PATH ?? "").split(delimiter);
  const files = directories.map((directory) => join(directory, ctx.guix));
  return files.find((file) => fs.existsSync(file)) ?? ctx.guix;
}

/** A short stand-in for a text that may be long or secret. */
function hash(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/** What tells whether a file that is too large to read often has changed. */
function stamp(file: string): string {
  const { dev, ino, size, mtimeNs, ctimeNs } = fs.statSync(file, {
    bigint: true,
  });
  return [fs.realpathSync(file), dev, ino, size, mtimeNs, ctimeNs].join(" ");
}

/** The state of something that an evaluation depends on. */
function digest(ctx: PluginContext, kind: string, name: string): string {
  try {
    if (kind === "file") return hash(fs.readFileSync(name));
    if (kind === "module") return stamp(name);
    if (kind === "guix") return stamp(findProgram(ctx));
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? "unreadable";
  }
  if (kind === "host") return hash(hostname());
  if (kind === "time") return String(Math.floor(Date.now() / patience));
  const value = ctx.environment[name];
  return value === undefined ? "unset" : hash(value);
}

/** Where outcomes are kept. */
function cacheFile(ctx: PluginContext): string {
  return join(ctx.stateDirectory, "offload", "guile-machines.json");
}

/** Reads the outcomes that are kept, by machine file. */
function readEntries(ctx: PluginContext): Record<string, Entry> {
  try {
    const { version, entries } = JSON.parse(
      fs.readFileSync(cacheFile(ctx), "utf8"),
    );
    return version === 1 ? entries : {};
  } catch {
    return {};
  }
}

/** Writes a file as a whole or not at all, for the eyes of its owner. */
function writePrivately(file: string, text: string): void {
  const temporary = `${file}.${process.pid}`;
  fs.rmSync(temporary, { force: true });
  try {
    fs.writeFileSync(temporary, text, { mode: 0o600, flag: "wx" });
    fs.renameSync(temporary, file);
  } finally {
    fs.rmSync(temporary, { force: true });
  }
}

/** Keeps an outcome; where that is not possible, work goes on without. */
function writeEntry(ctx: PluginContext, file: string, entry: Entry): void {
  const others = Object.entries(readEntries(ctx)).filter(([name]) =>
    name !== file
  );
  const kept = [...others, [file, entry]].slice(-maximumEntries);
  const entries = Object.fromEntries(kept);
  try {
    sharedDirectory(ctx);
    writePrivately(cacheFile(ctx), JSON.stringify({ version: 1, entries }));
  } catch (error) {
    const reason = (error as Error).message;
    ctx.log.debug(`failed to keep what Guile said of '${file}': ${reason}`);
  }
}

/** Lists what an outcome depends on. */
function inputsOf(file: string, outcome: Outcome): Entry["inputs"] {
  return [
    ["guix", ""],
    ["file", file],
    ...outcome.files.map((name) => ["file", name] as const),
    ...outcome.modules.map((name) => ["module", name] as const),
    ...outcome.variables.map((name) => ["variable", name] as const),
    ...(outcome.host ? [["host", ""] as const] : []),
    ...(outcome === timedOut ? [["time", ""] as const] : []),
  ];
}

/** The outcome that is kept for a file, if nothing it depends on changed. */
function keptOutcome(ctx: PluginContext, file: string): Outcome | undefined {
  const entry = readEntries(ctx)[file];
  const same = entry?.inputs.every(([kind, name], i) =>
    digest(ctx, kind, name) === entry.digests[i]
  );
  return same ? entry?.outcome : undefined;
}

/** Evaluates a file, or takes what came out the last time. */
async function outcomeOf(ctx: PluginContext, file: string): Promise<Outcome> {
  const kept = keptOutcome(ctx, file);
  if (kept) return kept;
  const before = digest(ctx, "file", file);
  const outcome = await evaluate(ctx, file);
  // A file that changed under Guile's eyes is for the next time.
  if (outcome.volatile || digest(ctx, "file", file) !== before) return outcome;
  const inputs = inputsOf(file, outcome);
  const digests = inputs.map(([kind, name]) => digest(ctx, kind, name));
  writeEntry(ctx, file, { inputs, digests, outcome });
  return outcome;
}

/** Where a variable is used: where evaluation stopped, or its first use. */
function placeOfVariable(
  { file, needsGuile = file }: MachineFile,
  variable: string,
): string {
  const [, place = file, form] = /^(.*:\d+:\d+): (.*)$/.exec(needsGuile) ?? [];
  if (form === variable) return place;
  const name = variable.replace(/\W/g, "\\$&");
  const use = new RegExp(`[\\s()[\\]'\`,]${name}[\\s()[\\]]`);
  const lines = fs.readFileSync(file, "utf8").split("\n");
  for (const [index, line] of lines.entries()) {
    const code = line.replace(
      /"([^"\\]|\\.)*"/g,
      (string) => '"'.repeat(string.length),
    ).replace(/;.*/, "");
    const column = ` ${code} `.search(use);
    if (column >= 0) return `${file}:${index + 1}:${column}`;
  }
  return place;
}

/** Where in a file the real Guix finds an error, or evaluation stopped. */
function placeOfError(
  machineFile: MachineFile,
  { place, variable }: NonNullable<Outcome["error"]>,
): string {
  if (place !== null) return place;
  if (variable !== null) return placeOfVariable(machineFile, variable);
  const { file, needsGuile = file } = machineFile;
  return needsGuile.replace(/^(.*:\d+:\d+): .*$/, "$1");
}

/** Says what is wrong with a file as a whole, if something is. */
function problemOf(
  machineFile: MachineFile,
  { error, machines }: Outcome,
): Problem | undefined {
  if (error) {
    const place = placeOfError(machineFile, error);
    const message = place ? `${place}: ${error.message}` : error.message;
    return { severity: "error", message };
  }
  if (machines) return undefined;
  const message =
    `'${machineFile.file}' did not return a list of build machines; ignoring it`;
  return { severity: "error", message };
}

/** Makes a machine of what Guile says of it, and reports what is wrong. */
function machineFrom(
  ctx: PluginContext,
  { fields, place }: NonNullable<Outcome["machines"]>[number],
): Machine[] {
  const where = place ?? "";
  const { system, systems } = fields;
  const deprecated = (systems ?? false) === false &&
    (system ?? false) !== false;
  if (deprecated) {
    const message =
      "The 'system' field is deprecated, please use 'systems' instead.";
    ctx.report({
      severity: "warning",
      message: where ? `${where}: ${message}` : message,
    });
  }
  const machine = ctx.machineFromFields(
    deprecated ? { ...fields, systems: [system] } : fields,
    where,
  );
  if (!("severity" in machine)) return [machine];
  ctx.report(machine);
  return [];
}

const plugin = {
  name: "guile-machines",
  async machines(ctx: PluginContext) {
    let machineFile;
    try {
      machineFile = await ctx.machineFile();
    } catch {
      return []; // the plugin "guix" tells what is wrong
    }
    const { file, needsGuile } = machineFile;
    if (needsGuile === undefined) return [];
    ctx.log.debug(`${needsGuile}: evaluated by Guile`);
    let outcome: Outcome;
    try {
      outcome = await outcomeOf(ctx, file);
    } catch (cause) {
      const reason = (cause as Error).message;
      throw new Error(
        `${needsGuile}: only Guile can evaluate this, and '${ctx.guix} repl' failed: ${reason}`,
        { cause },
      );
    }
    const problem = problemOf(machineFile, outcome);
    if (problem) ctx.report(problem);
    return (outcome.machines ?? []).flatMap((machine) =>
      machineFrom(ctx, machine)
    );
  },
} satisfies Plugin;

export default plugin as Plugin;
