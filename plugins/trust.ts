/**
 * `offload trust`: lets this machine and a build machine trust each other.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { existsSync, readFileSync, realpathSync } from "node:fs";
import { hostname, machine as architecture, userInfo } from "node:os";
import { resolve } from "node:path";
import { HOST_KEY_ALGORITHMS, ssh2 } from "../deps.ts";
import type {
  ConnectConfig,
  ParsedKey,
  ServerHostKeyAlgorithm,
} from "../deps.ts";
import {
  connect,
  evaluateMachineFile,
  EXIT,
  isDefault,
  isWithin,
  listMachines,
  machineId,
  makeSession,
  OffloadError,
  openSession,
  readPrivateKey,
  reason,
  sshKeyType,
} from "../mod.ts";
import type {
  CommandOptions,
  CommandResult,
  Context,
  Facts,
  Machine,
  Plugin,
  Screen,
  Session,
  SshError,
} from "../mod.ts";
import {
  askOnTerminal,
  authorizeHere,
  authorizeThere,
  ensureSigningKey,
  findSshKey,
  replaceFile,
  tellChange,
} from "./_authorization.ts";
import { demandRights, isBlank, isBlankFile } from "./_first_steps.ts";
import { hasErrors, systemOf, TIMEOUT_OPTION, timeoutOf } from "./_machines.ts";
import { inOneLine, unlessAborted } from "./_screen.ts";
import {
  formatReports,
  makeSample,
  outputOf,
  tellStep,
  testMachine,
} from "./_testing.ts";
import type { Sample, Step } from "./_testing.ts";
import { usageError } from "./_commands.ts";
import { probe } from "./_remote.ts";
import { fingerprint } from "./_ssh_errors.ts";

/** Asks a server for its host key, one of the types, and leaves it. */
function fetchHostKey(
  { name, port }: Pick<Machine, "name" | "port">,
  algorithms: readonly ServerHostKeyAlgorithm[],
  { settings }: Context,
): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const client = new ssh2.Client();
    client.on("error", (cause) => {
      const message = `failed to connect to '${name}': ${reason(cause)}`;
      const hint = `see how far 'ssh -v -p ${port} ${name}' gets`;
      reject(new OffloadError(message, { cause, hint }));
    });
    client.connect({
      ...{ host: name, port, username: "-" },
      readyTimeout: settings.connectTimeout * 1000,
      algorithms: { serverHostKey: [...algorithms] },
      hostVerifier: (key: Buffer) => {
        resolve(key);
        return false;
      },
    });
  });
}

/** Finds out a server's host key, which somebody must know to be right. */
async function confirmHostKey(
  target: Pick<Machine, "name" | "port">,
  expected: string | undefined,
  context: Context,
): Promise<string> {
  const types = Object.values(HOST_KEY_ALGORITHMS);
  const write = (key: Buffer) => `${sshKeyType(key)} ${key.toString("base64")}`;
  const fetch = (types: readonly ServerHostKeyAlgorithm[]) =>
    unlessAborted(context.signal, fetchHostKey(target, types, context));
  const first = await fetch(types.flat());
  if (expected === undefined) {
    const question = `The host key of '${target.name}' has the fingerprint\n` +
      `${fingerprint(first)} (${inOneLine(String(sshKeyType(first)))}).\n` +
      "Is that what 'ssh-keygen -l' shows there (yes or no)? ";
    const instead = `pass --fingerprint ${fingerprint(first)} if it is right`;
    const answer = await askOnTerminal(question, "plain", instead, context);
    if (/^y(es)?$/i.test(answer.trim())) return write(first);
    throw new OffloadError(`the host key of '${target.name}' is not trusted`);
  }
  if (fingerprint(first) === expected) return write(first);
  for (const type of types) {
    const key = await fetch(type).catch(() => first);
    if (fingerprint(key) === expected) return write(key);
  }
  throw new OffloadError(
    `no host key of '${target.name}' has the fingerprint ${expected}`,
    { hint: `it showed ${fingerprint(first)} (${sshKeyType(first)})` },
  );
}

/** Logs in by the agent's keys, or the password, which is asked for. */
function authenticateByAny(
  { user: username, name }: Machine,
  context: Context,
  fail: (error: unknown) => void,
): ConnectConfig["authHandler"] {
  const agent = context.environment.SSH_AUTH_SOCK;
  const question = `Password of ${username}@${name}: `;
  let tries = 0;
  return (left, _, next) => {
    if (tries++ === 0) {
      return next(agent ? { type: "agent", username, agent } : "none");
    }
    const types = ["password", "keyboard-interactive"] as const;
    const type = types.find((type) => left?.includes(type));
    if (type === undefined || tries > 4) return next(false as never);
    const instead = "add a key that may log in to the SSH agent, by 'ssh-add'";
    askOnTerminal(question, "secret", instead, context).then(
      (password) =>
        next(
          type === "password" ? { type, username, password } : {
            ...{ type, username },
            prompt: (_name, _instructions, _language, prompts, finish) =>
              finish(prompts.map(() => password)),
          },
        ),
      (error) => {
        fail(error);
        next(false as never);
      },
    );
  };
}

/** Logs in as the administrator does: by the agent, or by a password. */
async function connectAsAdministrator(
  machine: Machine,
  context: Context,
): Promise<Session> {
  const { user: username, name } = machine;
  let problem: unknown;
  const authHandler = authenticateByAny(machine, context, (error) => {
    problem = error;
  });
  const options = { authHandler, readyTimeout: 0 };
  return await connect(machine, context, undefined, options).then(
    (connection) => makeSession(machine, connection, context),
    (error) => {
      if (problem !== undefined) throw problem;
      if (error.cause?.level !== "client-authentication") throw error;
      const message = `failed to log in to '${name}' as '${username}'`;
      const hint = "add a key that may log in there to the SSH agent; root's " +
        "password, for one, is often not accepted";
      throw new OffloadError(message, { cause: error, hint });
    },
  );
}
/** Logs in with our key, which is made known there where it is not. */
async function logIn(machine: Machine, context: Context): Promise<Session> {
  const { user, name, privateKey } = machine;
  try {
    return await openSession(machine, context);
  } catch (error) {
    const { level } = ((error as Error).cause ?? {}) as SshError;
    if (level !== "client-authentication") throw error;
  }
  const parsed = ssh2.utils.parseKey(readPrivateKey(privateKey)) as ParsedKey;
  const comment = `offload@${hostname()}`;
  const line = `${parsed.type} ${parsed.getPublicSSH().toString("base64")} ` +
    `${comment}\n`;
  const session = await connectAsAdministrator(machine, context);
  try {
    const file = "~/.ssh/authorized_keys";
    const command = `umask 077; mkdir -p ~/.ssh
      [ -z "$(tail -c 1 ${file} 2>/dev/null)" ] || echo >>${file}
      cat >>${file}`;
    await outputOf(session, command, line);
  } finally {
    session.close();
  }
  tellChange(
    ...[
      context,
      `let '${privateKey}' log in as '${user}' on '${name}'`,
    ] as const,
    `remove '${comment}' from ~${user}/.ssh/authorized_keys there`,
  );
  return await openSession(machine, context);
}

/** The form of a machine in a machine file. */
function machineForm(machine: Partial<Machine>): string {
  const fields: Record<string, string | undefined> = {
    name: JSON.stringify(machine.name),
    port: machine.port === 22 ? undefined : String(machine.port),
    systems: `(list ${machine.systems?.map((it) => `"${it}"`).join(" ")})`,
    user: JSON.stringify(machine.user),
    "private-key": JSON.stringify(machine.privateKey),
    "host-key": JSON.stringify(machine.hostKey),
  };
  const lines = Object.entries(fields)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `\n  (${name} ${value})`);
  return `(build-machine${lines.join("")})`;
}

/**
 * Adds the form of a machine to the text of a machine file, of which all else
 * stays; `undefined` where there is no list to add it to.
 */
export function addToMachineFile(
  text: string,
  form: string,
  file: string,
  home: string,
): string | undefined {
  const indented = ` ${form.replaceAll("\n", "\n ")}`;
  if (isBlank(text)) {
    return `${text}${/[^\n]$/.test(text) ? "\n" : ""}(list\n${indented})\n`;
  }
  const evaluate = (text: string) => {
    const { machines, problems } = evaluateMachineFile(text, file, home);
    return JSON.stringify([machines, problems.length]);
  };
  const [machines, problems] = JSON.parse(evaluate(text));
  const [added] = evaluateMachineFile(`(list ${form})`, "", home).machines;
  const wanted = JSON.stringify([[...machines, added], problems]);
  // What it evaluates to shows whether that was the end of the list.
  let end = text.length;
  for (let tries = 0; tries < 100 && end > 0; tries++) {
    end = text.lastIndexOf(")", end - 1);
    const changed = `${text.slice(0, end)}\n${indented}${text.slice(end)}`;
    try {
      if (evaluate(changed) === wanted) return changed;
    } catch {
      // It was in a comment, for example.
    }
  }
  return undefined;
}

/** Reads `USER@HOST[:PORT]`. */
function parseTarget(text: string): Pick<Machine, "user" | "name" | "port"> {
  const pattern =
    /^([^@\s]+)@(?:\[([\da-fA-F:.]+)\]|([^:@\s]+))(?::(\d{1,5}))?$/;
  const [, user, address, name, port = "22"] = pattern.exec(text) ?? [];
  if (user !== undefined && isWithin(Number(port), 1, 65535)) {
    return { user, name: address ?? name!, port: Number(port) };
  }
  const message = `${text}: expected USER@HOST or USER@HOST:PORT`;
  if (!/^[^@\s]+$/.test(text)) throw usageError(message, "trust");
  const hint =
    `run 'offload trust root@${text}', or with another account there`;
  throw new OffloadError(message, {
    hint,
    code: "usage",
    exitCode: EXIT.usage,
  });
}

/** Makes the machine that is to be trusted, by what else is known of it. */
function makeMachine(fields: Partial<Machine>): Machine {
  const form = machineForm(fields);
  const { machines: [machine], problems: [problem] } = evaluateMachineFile(
    ...[`(list ${form})`, "", userInfo().homedir] as const,
  );
  if (machine !== undefined) return machine;
  throw usageError(problem!.message.replace(/^.*?: /, ""), "trust");
}

/** Finds what a file already says of a machine. */
async function findMachine(
  { user, name, port }: Pick<Machine, "user" | "name" | "port">,
  file: string | undefined,
  context: Context,
): Promise<Machine | undefined> {
  if (file === undefined || isBlankFile(file)) return undefined;
  const plugins = context.plugins.filter(isDefault);
  const found = (await listMachines({ ...context, plugins }))
    .find((machine) => machine.name === name && machine.port === port);
  if (hasErrors(context)) {
    throw new OffloadError(`'${file}' is to be corrected first`);
  }
  if (found === undefined || found.user === user) return found;
  throw usageError(
    `'${file}' has '${machineId(found)}' with user '${found.user}'`,
  );
}

/** Adds a machine to a file, where it can, or says what to add. */
function addMachine(machine: Machine, file: string, context: Context): string {
  const isThere = existsSync(file);
  const text = isThere ? readFileSync(file, "utf8") : "";
  const form = machineForm(machine);
  if (isThere && realpathSync(file).startsWith(`${context.storeDirectory}/`)) {
    // As Guix System has it.
    const what = `'${file}' is made from your 'operating-system'`;
    const hint = "add what is printed to the 'build-machines' of its " +
      "'guix-configuration', then run 'guix system reconfigure'";
    context.log.warn(new OffloadError(what, { hint }));
    return `#~${form.replaceAll("\n", "\n  ")}`;
  }
  const changed = addToMachineFile(text, form, file, userInfo().homedir);
  const name = machineId(machine);
  if (changed === undefined) {
    context.log.warn(`'${file}' does not end in a list: add to it yourself`);
    return form;
  }
  replaceFile(file, Buffer.from(changed), context);
  tellChange(context, `added '${name}' to '${file}'`, "remove it from there");
  return "";
}

/** Makes each side known to the other; returns the machine as it is then. */
async function introduce(
  target: Pick<Machine, "user" | "name" | "port">,
  known: Machine | undefined,
  { identity, fingerprint }: CommandOptions,
  context: Context,
): Promise<{ machine: Machine; sample: Sample }> {
  const expected = fingerprint === undefined ? undefined : String(fingerprint);
  const hostKey = known?.hostKey ??
    await confirmHostKey(target, expected, context);
  const given = identity === undefined
    ? known?.privateKey
    : resolve(String(identity));
  const privateKey = await findSshKey(given, context);
  const systems = [systemOf(architecture())];
  const fields = { ...target, hostKey, privateKey, systems };
  const machine = known === undefined
    ? makeMachine(fields)
    : { ...known, privateKey };
  await ensureSigningKey(context);
  const session = await logIn(machine, context);
  try {
    const { socket, uname } = await probe(session, context)
      .catch((): Partial<Facts> => ({}));
    session.useSocket(socket);
    const sample = await makeSample(context);
    await authorizeHere(session, context);
    await authorizeThere(session, sample, context);
    // It goes into a program: no more of what it says than a word.
    const [, there] = /^(?:\S+ ){3}(\w+)$/.exec(uname ?? "") ?? [];
    if (known || there === undefined) return { machine, sample };
    return { machine: { ...machine, systems: [systemOf(there)] }, sample };
  } finally {
    session.close();
  }
}

/** Tells where a machine was tested with another key than its file names. */
function tellOtherKey(
  { privateKey }: Machine,
  known: Machine,
  file: string,
  { log }: Context,
): void {
  if (resolve(known.privateKey) === privateKey) return;
  const hint = `change its private-key there to "${privateKey}", which is ` +
    `what this command logged in with, or try the other one by 'offload test'`;
  log.warn(
    new OffloadError(
      `'${file}' has '${machineId(known)}' with the SSH key ` +
        `'${known.privateKey}', and guix-daemon will log in with that`,
      { hint },
    ),
  );
}

/** Says where what is printed is to go. */
function tellWhereTo(text: string, { configDirectory, log }: Context): void {
  const file = `${configDirectory}/machines.scm`;
  log.info(
    `unless it is there already, add this to the list in '${file}', or run ` +
      `'offload trust ${text} --file ${file}', which does`,
  );
}

/** `offload trust USER@HOST[:PORT]`. */
async function trustCommand(
  [text]: readonly string[],
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  const target = parseTarget(text!);
  const file = options.file === undefined ? undefined : String(options.file);
  const more = file === undefined ? "" : ` --file ${file}`;
  demandRights(`offload trust ${text}${more}`, context);
  const seconds = timeoutOf(options, context);
  const known = await findMachine(target, file, context);
  const { machine, sample } = await introduce(target, known, options, context);
  const tell = (step: Step) => tellStep(machine, step, context);
  const report = await testMachine(
    ...[
      machine,
      () => Promise.resolve(sample),
      seconds,
      context,
      tell,
    ] as const,
  );
  if (known !== undefined) tellOtherKey(machine, known, file!, context);
  if (report.outcome === "failed") {
    return { output: formatReports([report], screen), exitCode: 1 };
  }
  if (file === undefined) {
    tellWhereTo(text!, context);
    return { output: machineForm(machine), exitCode: 0 };
  }
  return {
    output: known ? "" : addMachine(machine, file, context),
    exitCode: 0,
  };
}

const plugin = {
  name: "trust",
  command: {
    order: 3,
    usage: "USER@HOST[:PORT]",
    summary: "Let this machine and a build machine trust each other",
    description: [
      "It shows the host key's fingerprint and asks whether it is right; makes " +
      "an SSH key and a signing key where there are none; lets the SSH key " +
      "log in there as USER, which it does itself by your SSH agent or your " +
      "password; authorizes either side's signing key on the other one; and " +
      "tests the machine as 'offload test' does. What is so already stays. " +
      "Each change is told, and how to undo it.",
      "At the end the machine is added to FILE, or its form is printed. One " +
      "that FILE has already is not changed there: where it has another SSH " +
      "key than that of --identity, that is told.",
    ],
    options: [
      ["--file FILE", "Add the machine to this machine file"],
      ["--fingerprint SHA256:…", "Trust the host key that has it, unasked"],
      ["--identity FILE", "Log in with this SSH key, made if need be"],
      TIMEOUT_OPTION,
    ],
    examples: [
      [
        "offload trust root@w1.example.org --file /etc/guix/machines.scm",
        "sets up a build machine",
      ],
    ],
    async run(args, options, makeContext, screen) {
      const file = options.file === undefined
        ? undefined
        : String(options.file);
      const context = await makeContext(file);
      return trustCommand(args, options, context, screen);
    },
  },
} satisfies Plugin;

export default plugin as Plugin;
