/**
 * Makes keys, and makes them known here and there, for `offload trust`.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { execFile } from "node:child_process";
import { randomUUID } from "node:crypto";
import {
  closeSync,
  existsSync,
  fchmodSync,
  fchownSync,
  lstatSync,
  mkdtempSync,
  openSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import type { Stats } from "node:fs";
import { hostname, tmpdir, userInfo } from "node:os";
import { dirname } from "node:path";
import {
  asOwner,
  checkSignature,
  codeOf,
  findToken,
  isAtom,
  OffloadError,
  ownerOf,
  parseAcl,
  parseSexp,
  readPrivateKey,
  reason,
  removeFile,
  sexpKey,
  tokenValue,
} from "../mod.ts";
import type { Context, Session, Sexp } from "../mod.ts";
import { exportSample, outputOf, testImport } from "./_testing.ts";
import type { Sample } from "./_testing.ts";
import { AS_ACCOUNT } from "./_first_steps.ts";
import { quoteWord } from "./_remote.ts";

/** Runs a program here and returns what it printed. */
function runHere(
  program: string,
  args: readonly string[],
  { signal }: Pick<Context, "signal">,
): Promise<string> {
  return new Promise((resolve, reject) => {
    execFile(program, [...args], { signal }, (cause, stdout, stderr) => {
      if (cause === null) return resolve(stdout);
      const why = stderr.trim() || reason(cause);
      const message = `failed to run '${program} ${args[0]}': ${why}`;
      reject(new OffloadError(message, { cause }));
    });
  });
}

/** Asks on the terminal, whatever standard input is, without echo or with. */
const ASK_SCRIPT = `exec 3>&1 </dev/tty >/dev/tty
if [ "$2" = secret ]; then
  trap 'stty echo; echo' EXIT
  trap 'exit 1' HUP INT TERM
  stty -echo
fi
printf %s "$1"
IFS= read -r answer
printf %s "$answer" >&3`;

/** Asks the administrator, who may not be there. */
export async function askOnTerminal(
  question: string,
  kind: "secret" | "plain",
  instead: string,
  context: Context,
): Promise<string> {
  const args = ["-c", ASK_SCRIPT, "sh", question, kind];
  return await runHere("sh", args, context).catch((cause) => {
    context.signal.throwIfAborted();
    const hint = `without a terminal, ${instead}`;
    const message = "there is no terminal to ask for an answer";
    throw new OffloadError(message, { cause, hint });
  });
}

/** Says what was changed, and how to undo it. */
export function tellChange({ log }: Context, what: string, undo: string): void {
  log.info(`${what}\nto undo: ${undo}`);
}

/** Where a link is to be replaced: where it leads to, unless into the store. */
function endOfLink(
  file: string,
  { log, storeDirectory }: Pick<Context, "log" | "storeDirectory">,
): string {
  const target = realpathSync(file);
  if (!target.startsWith(`${storeDirectory}/`)) return target;
  // On Guix System: `guix archive --authorize` does likewise.
  const hint = "on Guix System, add it to your 'operating-system', too, or " +
    "the next reconfiguration undoes it";
  log.warn(new OffloadError(`'${file}' was a link into the store`, { hint }));
  return file;
}

/** Writes a new file, of an owner if root does it. */
function writeNew(
  file: string,
  contents: Uint8Array,
  mode: number,
  owner: Pick<Stats, "uid" | "gid"> | undefined,
): void {
  const descriptor = openSync(file, "wx", 0o600);
  try {
    writeFileSync(descriptor, contents);
    fchmodSync(descriptor, mode); // whatever the umask
    if (owner !== undefined && process.geteuid!() === 0) {
      fchownSync(descriptor, owner.uid, owner.gid);
    }
  } finally {
    closeSync(descriptor);
  }
}

/**
 * Replaces a file at once; owner and mode stay. Where another account owns the
 * directory that it is in, or leads to, it is done with the rights of that one,
 * who could lead root to another file.
 *
 * @throws {OffloadError} where it can't; then all is as it was.
 */
export function replaceFile(
  file: string,
  contents: Uint8Array,
  context: Pick<Context, "log" | "storeDirectory">,
): void {
  const isLink = existsSync(file) && lstatSync(file).isSymbolicLink();
  const place = isLink ? endOfLink(file, context) : file;
  const isOfStore = isLink && place === file;
  const kept = isOfStore
    ? undefined
    : statSync(place, { throwIfNoEntry: false });
  const temporary = `${place}.${randomUUID()}`;
  const directories = [file, place].map((it) => dirname(it));
  const others = directories.find((directory) => ownerOf(directory));
  try {
    asOwner(others ?? dirname(place), () => {
      try {
        const mode = (kept?.mode ?? 0o644) & 0o7777;
        writeNew(temporary, contents, mode, kept);
        renameSync(temporary, place);
      } finally {
        removeFile(temporary);
      }
    });
  } catch (cause) {
    const message = `failed to replace '${file}': ${reason(cause)}`;
    const isRoot = process.geteuid!() === 0;
    throw new OffloadError(message, {
      cause,
      hint: isRoot ? undefined : AS_ACCOUNT,
    });
  }
}

/** Whom the daemon runs as: who owns the store, as Guix sees it. */
function daemonUser({ storeDirectory }: Context): { uid: number; gid: number } {
  const { uid, gid } = statSync(storeDirectory);
  return { uid, gid: uid === 0 ? 0 : gid };
}

/** Whether the hook can log in with a key. */
function isUsableKey(file: string, uid: number): boolean {
  try {
    readPrivateKey(file);
    return uid === 0 || statSync(file).uid === uid;
  } catch {
    return false;
  }
}

/** Finds an SSH key that the hook can use, or makes one. */
export async function findSshKey(
  identity: string | undefined,
  context: Context,
): Promise<string> {
  const { uid, gid } = daemonUser(context);
  const own = `${context.configDirectory}/offload_key`;
  const usual = ["id_ed25519", "id_rsa"]
    .map((name) => `${userInfo().homedir}/.ssh/${name}`);
  const files = identity === undefined ? [own, ...usual] : [identity];
  const usable = files.find((file) => isUsableKey(file, uid));
  if (usable !== undefined) return usable;
  const file = files[0]!;
  if (existsSync(file)) {
    readPrivateKey(file); // says what is wrong with it
    throw new OffloadError(`'${file}' does not belong to guix-daemon's user`, {
      hint: `run 'chown ${uid}:${gid} ${file}'`,
    });
  }
  await makeSshKey(file, { uid, gid }, context);
  return file;
}

/** Makes an SSH key for the account that the hook runs as. */
async function makeSshKey(
  file: string,
  owner: { readonly uid: number; readonly gid: number },
  context: Context,
): Promise<void> {
  const comment = `offload@${hostname()}`;
  const pair = [file, `${file}.pub`];
  // Not where it is to be: who owns that directory could lead root by links.
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    const made = `${directory}/key`;
    const key = ["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", made];
    await runHere("ssh-keygen", key, context);
    const [secret, shown] = [made, `${made}.pub`].map((it) => readFileSync(it));
    asOwner(file, () => {
      removeFile(pair[1]!); // of a key that is gone
      writeNew(pair[1]!, shown!, 0o644, owner);
      writeNew(file, secret!, 0o600, owner);
    });
  } catch (cause) {
    if (cause instanceof OffloadError) throw cause;
    asOwner(file, () => pair.forEach(removeFile));
    const message = `failed to make '${file}' for guix-daemon's user`;
    throw new OffloadError(`${message}: ${reason(cause)}`, { cause });
  } finally {
    rmSync(directory, { recursive: true });
  }
  const made = `made the SSH key '${file}' for guix-daemon to log in with`;
  tellChange(context, made, `rm ${pair.join(" ")}`);
}

/** Makes the key that signs what is sent, where there is none. */
export async function ensureSigningKey(context: Context): Promise<void> {
  const file = `${context.configDirectory}/signing-key`;
  if (existsSync(`${file}.sec`)) return;
  await runHere(context.guix, ["archive", "--generate-key"], context);
  const made = `made the key pair '${file}.pub' and '${file}.sec' to sign with`;
  tellChange(context, made, `rm ${file}.pub ${file}.sec`);
}

/** Lets the machine import what we sign. */
export async function authorizeThere(
  session: Session,
  sample: Sample,
  context: Context,
): Promise<void> {
  const { name } = session.machine;
  const remote = await session.openDaemon();
  try {
    await testImport(remote, sample);
    return;
  } catch (error) {
    if (codeOf(error) !== "unauthorized") throw error;
  }
  const key = readFileSync(`${context.configDirectory}/signing-key.pub`);
  try {
    await outputOf(session, "guix archive --authorize", key);
  } catch (cause) {
    const line = key.toString().replace(/\s+/g, " ").trim();
    const hint = `run there, as root: echo ${quoteWord(line)} | ` +
      "guix archive --authorize";
    return context.log.warn(new OffloadError(reason(cause), { cause, hint }));
  }
  tellChange(
    ...[context, `authorized our signing key on '${name}'`] as const,
    "remove the entry of the key in our signing-key.pub from /etc/guix/acl " +
      "there",
  );
}

/** Writes an s-expression in the advanced format. */
function formatSexp(sexp: Sexp): string {
  if (!isAtom(sexp)) return `(${sexp.map(formatSexp).join(" ")})`;
  const text = sexp.toString("latin1");
  if (/^[A-Za-z.\/_:*+=-][\w.\/:*+=-]*$/.test(text)) return text;
  return `#${sexp.toString("hex").toUpperCase()}#`;
}

/**
 * Adds keys to the text of an access-control list, of which all else stays.
 *
 * @throws {OffloadError} where it is none.
 */
export function addToAcl(
  text: string,
  keys: readonly Sexp[],
  file: string,
): string {
  return keys.reduce((text: string, key) => {
    if (parseAcl(text, file).has(sexpKey(key))) return text;
    const end = text.lastIndexOf(")");
    const entry = `(entry ${formatSexp(key)} (tag (guix import)))`;
    return `${text.slice(0, end)}\n${entry}\n${text.slice(end)}`;
  }, text);
}

/** The key with which the machine signs; makes one where there is none. */
async function signingKeyOf(session: Session, context: Context): Promise<Sexp> {
  const { machine } = session;
  const fetch = async () =>
    await exportSample(await session.openDaemon(), machine);
  const { item } = await fetch().catch(async (error) => {
    await outputOf(session, "guix archive --generate-key").catch(() => {
      throw error;
    });
    tellChange(
      ...[context, `made a signing key on '${machine.name}'`] as const,
      "rm /etc/guix/signing-key.pub /etc/guix/signing-key.sec there",
    );
    return await fetch();
  });
  const signature = item.signature ?? "()";
  const key = findToken(parseSexp(signature, "signature"), "public-key") ?? [];
  const problem = checkSignature(signature, item.hash, new Set([sexpKey(key)]));
  if (problem === undefined) return key;
  throw new OffloadError(`signature of '${machine.name}': ${problem}`);
}

/** Lets the machine's signatures be believed here. */
export async function authorizeHere(
  session: Session,
  context: Context,
): Promise<void> {
  const file = `${context.configDirectory}/acl`;
  const own = `${context.configDirectory}/signing-key.pub`;
  const keys = [await signingKeyOf(session, context)];
  const exists = existsSync(file);
  // As Guix does when it makes the file.
  if (!exists) keys.unshift(parseSexp(readFileSync(own, "latin1"), own));
  const text = exists ? readFileSync(file, "latin1") : "(acl)\n";
  const changed = addToAcl(text, keys, file);
  if (changed === text) return;
  replaceFile(file, Buffer.from(changed, "latin1"), context);
  const q = tokenValue(keys.at(-1), "q")?.toString("hex").toUpperCase();
  const { name } = session.machine;
  tellChange(
    ...[context, `authorized the signing key of '${name}' here`] as const,
    `remove its entry${q ? `, with #${q}#,` : ""} from '${file}'`,
  );
}
