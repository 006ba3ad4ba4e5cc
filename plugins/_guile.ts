/**
 * Has the real Guix evaluate a machine file, and tells what that read. It is no
 * plugin.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import process from "node:process";
import type { PluginContext } from "../mod.ts";

/** How long Guile may take; the file may contain an endless loop. */
const TIMEOUT = 10_000;

/** How much Guile may write: far more than 10,000 machines. */
const MAXIMUM_OUTPUT = 1 << 26;

/** What an evaluation by Guile says, as `PROGRAM` writes it. */
export interface Outcome {
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
  /** Whether it may depend on more than that, such as a socket or the time. */
  readonly volatile: boolean;
  /** Whether it took too long: it may not, another time. */
  readonly isLate?: true;
}

/**
 * What is known to come to the same each time, or to be watched. A module all
 * of which is pure is listed as such; of others, what may be used.
 */
const KNOWN = String.raw`
(define pure-modules
  '((ice-9 curried-definitions) (ice-9 match) (ice-9 optargs) (ice-9 receive)
    (ice-9 regex) (ice-9 string-fun) (ice-9 vlist) (rnrs lists)
    (srfi srfi-1) (srfi srfi-2) (srfi srfi-8) (srfi srfi-9)
    (srfi srfi-9 gnu) (srfi srfi-11) (srfi srfi-13) (srfi srfi-14)
    (srfi srfi-26) (srfi srfi-31) (srfi srfi-69) (srfi srfi-71)))

;; Where files are read by what is watched.
(define reading-names
  '(call-with-input-file close-input-port close-port eof-object eof-object?
    file-exists? get-char get-line get-string-all get-string-n
    open-input-file peek-char read read-char read-delimited read-line
    read-string string->port with-input-from-file))

(define guile-names
  '(* + - / < <= = > >= 1+ 1- abs acons and=> append append! append-map apply
    assoc assoc-ref assq assq-ref assv assv-ref basename boolean? caar cadar
    caddr cadddr cadr call-with-input-string call-with-output-string
    call-with-values call/cc car catch cdadr cdar cddr cdddr cdr ceiling char->integer
    char-alphabetic? char-downcase char-numeric? char-upcase char-whitespace?
    char=? char? complement compose cons cons* const delete delete! delq
    dirname display dynamic-wind eq? equal? eqv? error even? exact->inexact
    exact? expt false-if-exception filter filter-map find floor fold
    fold-right for-each format gcd getenv gethostname hash-ref hash-set!
    identity inexact->exact inexact? integer->char integer? iota keyword?
    last last-pair lcm length list list->string list->vector list-copy
    list-head list-index list-ref list-tail list? logand logior make-hash-table
    make-list make-parameter make-string make-struct/no-tail make-vector map
    max member memq memv min modulo negate negative? newline not null?
    number->string number? object->string odd? pair? partition positive?
    procedure? quotient raise-exception real? reduce remainder remove
    reverse reverse! round simple-format sort sort! stable-sort string
    string->list string->number string->symbol string-any string-append
    string-capitalize string-concatenate string-contains string-copy
    string-count string-downcase string-drop string-drop-right string-every
    string-filter string-for-each string-index string-join string-length
    string-map string-match string-null? string-pad string-pad-right
    string-prefix? string-prefix-ci? string-ref string-replace
    string-replace-substring string-reverse string-rindex string-split
    string-suffix? string-take string-take-right string-tokenize
    string-trim string-trim-both string-trim-right string-upcase string<?
    string=? string-ci=? string>? string? substring symbol->string
    symbol-append symbol? throw truncate values vector vector->list
    vector-length vector-map vector-ref vector-set! vector? void warn
    with-exception-handler current-error-port current-output-port
    force-output with-input-from-string with-output-to-string
    write zero? char-set char-set-complement char-set:whitespace
    char-set:digit char-set:letter char-set-contains? make-fluid fluid-ref
    make-promise force make-struct/simple make-prompt-tag struct-ref
    call-with-prompt list-transduce process-use-modules
    current-module module-export! call-with-deferred-observers
    make-syntax-transformer syntax->datum datum->syntax
    generate-temporaries identifier? free-identifier=? bound-identifier=?
    $sc-dispatch make-variable-transformer syntax-violation))

(define offload-names
  '(build-machine? build-machine-name build-machine-port
    build-machine-systems build-machine-user build-machine-private-key
    build-machine-host-key build-machine-compression
    build-machine-daemon-socket build-machine-overload-threshold
    build-machine-features build-machine-location make-build-machine
    user-openssh-private-key source-properties->location
    record-abi-mismatch-error struct-vtable
    #{ %make-build-machine-procedure/abi-check}# %build-machine?-procedure
    #{% <build-machine> abi-cookie}# #{% <build-machine> rtd}#))

;; By the variable: whatever it is called, and wherever from.
(define known-variables (make-hash-table))

(define (know! module names)
  (for-each (lambda (name)
              (let ((variable (module-variable module name)))
                (when variable
                  (hashq-set! known-variables variable #t))))
            names))

(define (known-module? module)
  (or (memq module (list the-scm-module the-root-module))
      (member (module-name module)
              (append pure-modules
                      '((guile) (guix scripts offload) (guix gexp)
                        (ice-9 format) (ice-9 rdelim) (ice-9 textual-ports)
                        (rnrs io ports))))))

(for-each (lambda (name)
            (let ((interface (resolve-interface name)))
              (know! interface (module-map (lambda (name _) name) interface))))
          pure-modules)
(know! the-root-module guile-names)
(know! the-root-module reading-names)
(know! (resolve-module '(guix scripts offload)) offload-names)
(for-each (lambda (name) (know! (resolve-interface name) reading-names))
          '((ice-9 rdelim) (ice-9 textual-ports) (rnrs io ports)))
(know! (resolve-interface '(ice-9 format)) '(format))
(know! (resolve-module '(guix records)) '(record-abi-mismatch-error))

(define (known? module name)
  (let ((variable (and module (module-variable module name))))
    (and variable
         (or (hashq-ref known-variables variable)
             (eq? variable (module-local-variable user-module name))))))

;; Checked once more at the end: they may be defined further down.
(define unknown '())

(define (examine tree)
  (define (check module name)
    (unless (known? module name)
      (set! unknown (acons module name unknown))))
  (define (module-named name)
    (if name (resolve-module name #f #:ensure #f) (current-module)))
  (tree-il-fold
   (lambda (node _)
     (cond ((toplevel-ref? node)
            (check (module-named (toplevel-ref-mod node))
                   (toplevel-ref-name node)))
           ((module-ref? node)
            (check (module-named (module-ref-mod node))
                   (module-ref-name node)))
           ((primitive-ref? node)
            (check the-root-module (primitive-ref-name node)))
           ((or (module-set? node)
                (not (eq? (current-module) user-module)))
            (set! volatile? #t))))
   (const #f) #f tree))
`;

/**
 * What Guile runs, with the name of the machine file in `file`. It evaluates it
 * like the procedure `build-machines` of (guix scripts offload), in the same
 * module and with the same HOME, watches what is read meanwhile, and writes one
 * line: a record separator and JSON.
 *
 * What the program refers to, once its macros are expanded, must be known: to
 * come to the same each time, or to be watched. All else is `volatile`.
 */
const PROGRAM = String.raw`
(use-modules (guix scripts offload) (guix diagnostics) (ice-9 match)
             (language tree-il) (srfi srfi-1))

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
    ;; Whose working directory it is, is not compared.
    (unless (string-prefix? "/" name) (set! volatile? #t))
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
    ((and (? real?) (? inf?)) (if (positive? value) "1e999" "-1e999"))
    ((and (? real?) (not (? nan?)))
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

(define user-module (@@ (guix scripts offload) %user-module))

(define evaluating? #f)

(define (evaluate)
  (catch #t
    (lambda ()
      (save-module-excursion
       (lambda ()
         (set-current-module user-module)
         (set! evaluating? #t)
         (match (primitive-load file)
           (((? build-machine? machines) ...)
            (vector (cons "machines" (map machine->json machines))))
           (_ (vector))))))
    report))

${KNOWN}
(set-module-transformer! user-module
                         (lambda (form)
                           (let ((tree (macroexpand form)))
                             (examine tree)
                             tree)))

;; Macros that are no top-level ones are evaluated by this, and gone then.
(watch-all '(primitive-eval)
           (lambda (form)
             (when (and evaluating? (macroexpanded? form)) (examine form))))
(watch-all '(open-file open open-fdes stat access? primitive-load) note-file!)
(watch-all '(primitive-load-path) note-module!)
(watch-all '(getenv) note-variable!)
(watch-all '(gethostname uname) note-host!)
(watch-all '(primitive-fork system system* spawn opendir environ current-time
             gettimeofday)
           note-volatile!)
(watch (resolve-module '(ice-9 popen)) 'piped-process note-volatile!)

(let ((result (vector->list (evaluate))))
  (set! evaluating? #f)
  (unless (and (every known-module? (module-uses user-module))
               (every (match-lambda ((module . name) (known? module name)))
                      unknown))
    (set! volatile? #t))
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
const TIMED_OUT: Outcome = {
  error: {
    message: `no result after ${TIMEOUT / 1000} seconds: an endless loop?`,
    place: null,
    variable: null,
  },
  files: [],
  modules: [],
  variables: [],
  host: false,
  volatile: false,
  isLate: true,
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
  context: PluginContext,
  input: string,
): Promise<string | undefined> {
  return new Promise((resolve, reject) => {
    const env = { ...context.environment, GUILE_AUTO_COMPILE: "0" };
    // A process group of its own, to be killed with all that is in it.
    const options = { detached: true, env: env as NodeJS.ProcessEnv };
    const child = spawn(context.guix, ["repl", "-t", "machine"], options);
    let output = "";
    let errors = "";
    const finish = (end: () => void) => {
      clearTimeout(timer);
      context.signal.removeEventListener("abort", abort);
      kill(child);
      end();
    };
    const fail = (reason: string) => finish(() => reject(new Error(reason)));
    const abort = () => fail("interrupted");
    const timer = setTimeout(() => finish(() => resolve(undefined)), TIMEOUT);
    context.signal.addEventListener("abort", abort);
    if (context.signal.aborted) abort();
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      output += text;
      if (output.length > MAXIMUM_OUTPUT) fail("it writes too much");
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

/**
 * Has Guile evaluate a machine file.
 *
 * @throws {Error} where there is no Guile to do that.
 */
export async function evaluate(
  context: PluginContext,
  file: string,
): Promise<Outcome> {
  const input = `(define file ${schemeString(file)})\n${PROGRAM}`;
  const output = await runGuile(context, input);
  if (output === undefined) return TIMED_OUT;
  const start = output.indexOf("\x1e") + 1;
  return JSON.parse(output.slice(start, output.indexOf("\n", start)));
}
