/**
 * What plugins are and are given, commands included. mod.ts hands it on: here
 * are types alone, which neither runtime reads.
 *
 * @module
 */

import type { Duplex } from "node:stream";
import type {
  BuildContext,
  connectByPlugin,
  ErrorCode,
  PathInfo,
  Settings,
  StoreConnection,
} from "./mod.ts";
import type { JournalEntry, Observations, Slot } from "./notes.ts";

/**
 * A build machine: a `<build-machine>` record of guix/scripts/offload.scm,
 * with the names of its fields in camel case.
 */
export interface Machine {
  /** Host name or address, of which libssh overlooks `USER@` and brackets. */
  readonly name: string;
  /** TCP port of its SSH server. */
  readonly port: number;
  /** System types it builds for, for example `x86_64-linux`. */
  readonly systems: readonly string[];
  /** Account to log in to. */
  readonly user: string;
  /** File name of the SSH private key to log in with. */
  readonly privateKey: string;
  /** Its SSH host key as OpenSSH writes it: `ssh-ed25519 AAAA… comment`. */
  readonly hostKey: string;
  /** The reference's list of SSH compression methods; `none` for never. */
  readonly compression: string;
  /** Compression level, 1 to 9. */
  readonly compressionLevel: number;
  /** File name of the guix-daemon socket there. */
  readonly daemonSocket: string;
  /**
   * Normalized load (0 to 1) from which on it gets no build; `false`, like 1
   * or more, for any.
   */
  readonly overloadThreshold: number | false;
  /** How many builds it runs at a time: its slots. */
  readonly parallelBuilds: number;
  /** Relative speed: a machine of 2 is preferred to one of 1. */
  readonly speed: number;
  /** Features that derivations may require, for example `kvm`. */
  readonly features: readonly string[];
}

/** A build that the daemon offers. */
export interface Request {
  /** Whether the daemon has a free slot and would build it itself. */
  readonly wantsLocal: boolean;
  /** The system type it is for. */
  readonly system: string;
  /** File name of the derivation. */
  readonly derivation: string;
  /** The features that it requires. */
  readonly features: readonly string[];
}

/** The environment's variables. */
export type Variables = Readonly<Record<string, string | undefined>>;

/** Limits that a build runs under, in seconds. */
export interface BuildOptions {
  /** How long it may print nothing. */
  readonly maxSilentTime: number;
  /** How long it may take. */
  readonly buildTimeout: number;
}

/** How a piece of text is meant. */
export type Style = "good" | "bad" | "doubtful" | "heading";

/** A piece of text that is coloured, where there are colours. */
export interface Styled {
  /** What it means. */
  readonly style: Style;
  /** As it came: it is cleaned before it is coloured. */
  readonly text: string;
}

/** Where a request or a command writes its messages, a line each. */
export interface Log {
  /** Progress that every user sees; what follows is of the same line. */
  info(message: string, ...more: readonly (string | Styled)[]): void;
  /** A trace that clients parse, such as `@ build-remote`. */
  trace(line: string): void;
  /** Something is wrong, and work goes on. */
  warn(problem: unknown): void;
  /** Something is wrong, and the work ends. */
  error(problem: unknown): void;
  /** For debugging: written only where OFFLOAD_DEBUG is set. */
  debug(message: string): void;
}

/** Where a command shows what it has to say. */
export interface Screen {
  /** Whether a person looks at it: only then there are tables. */
  readonly isTerminal: boolean;
  /** Colours a text, which is clean, where there are colours. */
  paint(style: Style, text: string): string;
  /** How many columns and lines there is room for. */
  size(): readonly [columns: number, lines: number];
  /** Draws how much of something is done, 0 to 1. */
  bar(share: number, columns: number): string;
  /** Writes text as it is. */
  print(text: string): void;
  /** Shows whoever waits how much of some work is done, until it ends. */
  progress(what: string, total: number): Progress;
}

/** Work that is shown to whoever waits for it. */
export interface Progress {
  /** Another part is done. */
  step(): void;
  /** All is done, or given up. */
  end(): void;
}

/** Something wrong with a machine file or with one machine in it. */
export interface Problem {
  /** A machine with an error is left out, one with a warning is not. */
  readonly severity: "warning" | "error";
  /** What is wrong, after `FILE:LINE:COLUMN: ` where the place is known. */
  readonly message: string;
  /** What to do about it. */
  readonly hint?: string | undefined;
  /** How it is told, where not as what it is. */
  readonly toldAs?: "warning" | undefined;
  /** What is wrong, for programs: `configuration` unless told. */
  readonly code?: ErrorCode | undefined;
}

/** What a machine file evaluates to. */
export interface MachineFile {
  /** Its name. */
  readonly file: string;
  /** The machines, in the order of the file. */
  readonly machines: readonly Machine[];
  /** Warnings and errors. */
  readonly problems: readonly Problem[];
  /** Place and name of what only Guile can evaluate; no machines then. */
  readonly needsGuile?: string;
}

/** A value, or the promise of one. */
export type Awaitable<T> = T | Promise<T>;

/** The options of a plugin: what the settings say over their defaults. */
export type Options = Readonly<Record<string, number | boolean | string>>;

/** A setting, or an option of a plugin, in the words of JSON Schema. */
export interface Setting {
  /** What it means, and in which unit. */
  readonly description: string;
  /** What it is unless told; what is told must be of the same type. */
  readonly default: number | boolean | string | Readonly<Record<string, never>>;
  /** The least number. */
  readonly minimum?: number;
  /** The largest number. */
  readonly maximum?: number;
}

/** What a build machine says of itself. */
export interface Facts {
  /** When it said so, in milliseconds since 1970. */
  readonly time: number;
  /** How long a message there and back takes, in milliseconds. */
  readonly roundTrip?: number | undefined;
  /** How long it took to log in, until its guix-daemon answered, in seconds. */
  readonly login?: number | undefined;
  /** The daemon's socket that the login's own environment names. */
  readonly socket?: string | undefined;
  /** Load average of the last minute. */
  readonly load?: number | undefined;
  /** Logical processors. */
  readonly cores?: number | undefined;
  /** Bytes of memory that are available. */
  readonly memory?: number | undefined;
  /** Share of the last 10 s (0 to 100) in which tasks waited for each. */
  readonly pressure?:
    | Readonly<Record<"cpu" | "io" | "memory", number>>
    | undefined;
  /** Bytes and inodes that are free in its store. */
  readonly store?: FreeSpace | undefined;
  /** Bytes and inodes that are free where it builds. */
  readonly build?: FreeSpace | undefined;
  /** Seconds that its clock is ahead of ours. */
  readonly clock?: number | undefined;
  /** Kernel, host name, release and architecture, as uname says. */
  readonly uname?: string | undefined;
}

/** Room in a file system. */
export interface FreeSpace {
  /** Free bytes. */
  readonly bytes: number;
  /** Free inodes. */
  readonly inodes: number;
}

/** A build that was done. */
export interface PastBuild {
  /** NAME:PORT of the machine. */
  readonly machine: string;
  /** How long it took, in seconds. */
  readonly seconds: number;
}

/** A store item that a build needs. */
export interface InputItem {
  /** File name. */
  readonly path: string;
  /** Size of its nar, in bytes. */
  readonly size: number;
}

/** A machine that could take a build, as a score sees it. */
export interface Candidate {
  /** The machine. */
  readonly machine: Machine;
  /** Its NAME:PORT. */
  readonly id: string;
  /** What it said of itself a few seconds ago at most, if it did. */
  readonly facts: Facts | undefined;
  /** How many of its slots are free now. */
  freeSlots(): number;
  /** Those of `paths` that it was seen to hold. */
  holds(paths: readonly string[]): readonly string[];
  /** Bytes a second that it was seen to receive, if it was. */
  readonly bandwidth: number | undefined;
  /** When it last began a build of ours, in milliseconds since 1970. */
  readonly lastUsed: number | undefined;
}

/** A build to score machines for. */
export interface ScoredRequest extends Request {
  /** Name of the derivation, without hash and `.drv`. */
  readonly name: string;
  /** Earlier builds of that name, the latest first. */
  history(): readonly PastBuild[];
  /** What it needs; takes a while. */
  inputs(): Promise<readonly InputItem[]>;
}

/** What a plugin is given beside the matter at hand. */
export interface PluginContext {
  /** Messages for the user whose build it is. */
  readonly log: Log;
  /** Ends the work. */
  readonly signal: AbortSignal;
  /** The settings. */
  readonly settings: Settings;
  /** The plugin's own options. */
  readonly options: Options;
  /** The environment's variables. */
  readonly environment: Variables;
  /** Where Guix keeps its configuration: /etc/guix. */
  readonly configDirectory: string;
  /** Where Guix keeps its state: /var/guix. */
  readonly stateDirectory: string;
  /**
   * Does what touches a file of the state as its owner, whose alone it is: as
   * such even where root runs a command.
   */
  asOwner<T>(file: string, action: () => T): T;
  /**
   * Has a directory of the state in which something can be written, or one in
   * memory in place of it.
   */
  writable(directory: string): string;
  /** The machine file, as far as it is evaluated without Guile. */
  machineFile(): Awaitable<MachineFile>;
  /** Tells of something wrong with the machine file. */
  report(problem: Problem): void;
  /** The program of the real guix. */
  readonly guix: string;
  /** Checks the fields of a machine, named as in the machine file. */
  machineFromFields(
    fields: Record<string, unknown>,
    where: string,
  ): Machine | Problem;
}

/** A build's connections, for a transport. */
export interface TransportContext extends PluginContext {
  /** The build machine. */
  readonly machine: Machine;
  /** The daemon of the build machine. */
  readonly remote: StoreConnection;
  /** The daemon here. */
  readonly local: StoreConnection;
  /** How long a message there and back takes, in milliseconds. */
  readonly roundTrip: number;
  /** Opens another connection to the daemon of the build machine. */
  openDaemon(): Promise<StoreConnection>;
  /** Leaves one, on which nothing went wrong, to who opens one next. */
  leaveDaemon(store: StoreConnection): void;
  /** Runs a shell command on the machine. */
  exec(command: string): Promise<RemoteProcess>;
  /**
   * Does work while which nothing need pass over the connections: else a
   * machine is given up after `stepTimeout`.
   */
  patiently<T>(work: () => Promise<T>): Promise<T>;
  /** Makes a bundle of items, which the daemon here signs. */
  exportBundle(paths: readonly string[]): AsyncIterable<Uint8Array>;
}

/**
 * How far a connection is: a server is there, it has said something, and it has
 * shown the right host key.
 */
export type Reached = "connect" | "greeting" | "host key";

/** A command that runs on a build machine. */
export interface RemoteProcess {
  /** Its standard input and output. */
  readonly channel: Duplex;
  /**
   * Settles at its end, once all its output was read: its exit code, and what
   * it wrote to standard error.
   */
  readonly ended: Promise<{ readonly code: number; readonly errors: string }>;
}

/** A connection to a build machine, over which all goes there and back. */
export interface Connection {
  /** Why it ended, if it did. */
  failure(): Error | undefined;
  /** Settles when it has ended, where that is noticed. */
  readonly ended?: Promise<void>;
  /** Connects to a Unix-domain socket there; rejects where that can't be. */
  openSocket(file: string): Promise<Duplex>;
  /**
   * So many bytes arrive at such a socket in one piece, if they are written in
   * one: then a daemon takes requests together. Default: 0.
   */
  readonly pieceSize?: number;
  /** Runs a shell command there. */
  exec(command: string): Promise<RemoteProcess>;
  /** What builds leave there, where it is kept for the next. */
  readonly kept?: Kept;
  /** Ends it and all that runs over it; because of an error, at once. */
  close(error?: Error): void;
}

/** What is kept with a connection to a machine. */
export interface Kept {
  /** Connections to its guix-daemon that nobody uses: the last is used next. */
  readonly daemons: StoreConnection[];
  /** When something last passed over a channel, by `performance.now()`. */
  used: number;
}

/** Why a machine gets no build now. */
export interface Exclusion {
  /** The reason, as users read it. */
  readonly why: string;
  /** Whether builds had better wait for it than be built locally. */
  readonly isBusy: boolean;
  /** Makes it ready, in the background: a build has no other place. */
  start?(): Awaitable<void>;
  /** Whether it is being made ready: meanwhile no other machine is started. */
  readonly isStarting?: boolean;
}

/**
 * Moves archives between the stores. What it brings is checked here, whatever
 * brought it.
 */
export interface Transport {
  /**
   * Returns those of `paths` that the machine lacks, and may first have it fetch
   * what it can by itself.
   */
  missing(paths: readonly string[]): Awaitable<readonly string[]>;
  /**
   * Waits for the right to send `size` bytes, where there is such a thing: then
   * it is asked again what is missing. What it returns gives the right back.
   */
  reserve?(size: number): Awaitable<Pick<Slot, "release"> | undefined>;
  /** Sends items, each after those that it refers to. */
  send(items: ReadonlyMap<string, PathInfo>): Awaitable<void>;
  /** Told when a derivation is there and is being built: `retrieve` is next. */
  prepare?(derivation: string): void;
  /**
   * The bundle that `guix archive --export` makes of `paths` there: items of
   * `size` bytes, where that is known.
   */
  retrieve(paths: readonly string[], size?: number): AsyncIterable<Uint8Array>;
}

/** The hooks: what a plugin may do. */
export interface Hooks {
  /** Lists machines; of all plugins' lists, the first NAME:PORT wins. */
  machines(context: PluginContext): Awaitable<readonly Machine[]>;
  /** Says why a machine is not even to be asked; the first answer wins. */
  exclude(
    machine: Machine,
    context: PluginContext,
  ): Awaitable<Exclusion | undefined>;
  /**
   * Connects to a machine with the pinned host key; the first answer wins. It
   * may tell `reached` how far it is.
   */
  connect(
    machine: Machine,
    context: PluginContext,
    reached?: (what: Reached) => void,
  ): Awaitable<Connection | undefined>;
  /** Scores a machine; summed. `undefined` abstains, -Infinity vetoes. */
  score(
    candidate: Candidate,
    request: ScoredRequest,
    context: PluginContext,
  ): Awaitable<number | undefined>;
  /** Takes leave to build there until the connection ends; `false`: none. */
  admit(
    machine: Machine,
    context: TransportContext,
  ): Awaitable<boolean | undefined>;
  /** Moves archives to and from a machine; the first answer wins. */
  transport(
    machine: Machine,
    context: TransportContext,
  ): Awaitable<Transport | undefined>;
  /** Told of a build that is over: nothing waits for what it does then. */
  ended(build: JournalEntry, context: PluginContext): Awaitable<void>;
}

/** A plugin: a name, and at least one hook, or a command. */
export interface Plugin extends Partial<Hooks> {
  /** Names it in messages and settings. */
  readonly name: string;
  /** What the setting `use` may say of it. */
  readonly options?: Readonly<Record<string, Setting>>;
  /** What `offload` and its name do. */
  readonly command?: Command;
}

/** What an error that a hook throws may say beside its message. */
export interface PluginError extends Error {
  /** What the user can do about it. */
  readonly hint?: string;
  /** Whether it is this machine's failure: no other build machine would help. */
  readonly isLocal?: boolean;
}

/** What serving a request needs of the world. */
export interface Context extends PluginContext {
  /** Takes the log of the build; settles when it can take more. */
  readonly buildLog: (text: Uint8Array) => Awaitable<void>;
  /** Limits on the build. */
  readonly buildOptions: BuildOptions;
  /** The system type of this machine. */
  readonly system: string;
  /** The store: /gnu/store. */
  readonly storeDirectory: string;
  /** Socket of this machine's daemon. */
  readonly daemonSocket: string;
  /** The plugins, in the order in which they are asked. */
  readonly plugins: readonly Plugin[];
  /** What was reported of the machine file. */
  readonly problems: readonly Problem[];
  /** What our processes saw of the machines. */
  readonly observations: Observations;
  /** Connects to machines, where connections to them are kept. */
  readonly connect?: typeof connectByPlugin;
  /** Connections to the daemon here that are kept, where they are. */
  readonly localDaemons?: StoreConnection[];
  /** Those who wait for slots, where this process serves several hooks. */
  readonly queue?: SlotQueue;
  /** Has another process move store items; false where it is to be done here. */
  readonly carry?: (load: Load, context: BuildContext) => Promise<boolean>;
  /** Tells plugins of a build that is over, where this process stays for that. */
  readonly tellLater?: (build: JournalEntry) => void;
}

/** Store items that are to be moved for a build: one of both. */
export interface Load {
  /** What is built. */
  readonly derivation: string;
  /** How much they are, in bytes. */
  readonly bytes: number;
  /** What is to be sent. */
  readonly inputs?: readonly string[];
  /** What is to be retrieved. */
  readonly outputs?: readonly string[];
}

/** Those who wait for slots in a process. */
export interface SlotQueue {
  /** Waits for a free slot until `end`, by `performance.now()`. */
  untilFree(
    isFree: () => boolean,
    end: number,
    signal: AbortSignal,
  ): Promise<boolean>;
  /** Told that a slot was freed here. */
  tellFreed(): void;
}

/** A command: help, completion and manual page are made of this. */
export interface Command {
  /** Where help lists it, before those that do not say; then by name. */
  readonly order?: number;
  /** What may follow: `[` begins what needn't. */
  readonly usage: string;
  /** What it does, in a line: a verb first. */
  readonly summary: string;
  /** What else there is to know about it, a paragraph each. */
  readonly description: readonly string[];
  /** Its options, with the name of the value that one takes; meanings. */
  readonly options: readonly (readonly [usage: string, meaning: string])[];
  /** Command lines, and what each does. */
  readonly examples: readonly (readonly [line: string, meaning: string])[];
  /** Does it: with its arguments, and its options by their names. */
  run(
    args: readonly string[],
    options: CommandOptions,
    makeContext: (machineFile?: string, log?: Log) => Promise<Context>,
    screen: Screen,
  ): Promise<CommandResult>;
  /** Stands around the run, even of one that was called wrongly. */
  around?(
    options: CommandOptions,
    run: () => Promise<CommandResult>,
  ): Promise<CommandResult>;
}

/** The options of a command, as cac names them. */
export type CommandOptions = Readonly<
  Record<string, string | number | boolean | undefined>
>;

/** What a command has to say, and its exit code. */
export interface CommandResult {
  /** What is printed; empty: nothing. */
  readonly output: string;
  /** What the program exits with. */
  readonly exitCode: number;
  /** What is wrong beside it: told after the output. */
  readonly problem?: unknown;
}
