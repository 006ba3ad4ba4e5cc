;;; work.scm - make derivations of real work that build offline.
;;;
;;; In a master of the lab:
;;;
;;;   guix repl -- /offload/scripts/lab/work.scm OPTIONS
;;;
;;; It prints one .drv file name a line.  Builders are busybox's shell, which
;;; the lab keeps in /opt/work/busybox; all parameters are in the environment
;;; of the build, so that nothing but the .drv differs between two builds
;;; unless inputs are asked for.
;;;
;;; As 'work.scm --serve=FIFO' it makes that FIFO and stays, for who makes work
;;; often: a second is saved each time.  A request is a list of strings, a name
;;; and options; FIFO.NAME then begins with a line 'done' or 'failed', before
;;; what else would have been printed.

(use-modules (guix store)
             (guix derivations)
             ((guix utils) #:select (%current-system
                                     call-with-temporary-directory))
             (ice-9 binary-ports)
             (ice-9 getopt-long)
             (ice-9 match)
             (rnrs bytevectors)
             (srfi srfi-1)
             (srfi srfi-26))

(define usage "\
usage: guix repl -- work.scm [OPTION…]
  --count=N         make N derivations (default: 1)
  --name=NAME       call all of them NAME (default: work)
  --seed=STRING     what makes them unique (default: random, so always new)
  --system=SYSTEM   build for SYSTEM (default: this one)
  --features=A,B    require these features of the build machine
  --local           prefer to be built by the daemon itself
  --chain           let each depend on the one before
inputs, new ones for each derivation:
  --inputs=N        N source files
  --input-size=N    of N bytes each (default: 64)
  --input-files=N   a source directory of N small files
  --text-inputs=N   N text items
inputs and outputs:
  --compressible    two thirds of their bytes are zeros, else none
builds:
  --seconds=S       take S seconds, may be a fraction
  --loops=N,…       keep a processor busy for N turns of a loop: each derivation,
                    called NAME-NUMBER, for the next of these numbers
  --log-lines=N     print N lines, spread over these seconds
  --silent          print nothing else
  --fail            print the lines, take the time, then fail
  --die             the same, but be killed by SIGKILL: a limit is reached
  --print=FILE      print FILE; a build that runs in no chroot finds it
  --scratch-size=N  fill N bytes in the build directory
outputs:
  --outputs=A,B     have these outputs, each referring to the next (default: out)
  --output-size=N   N bytes in each
  --output-files=N  N files of a byte, too
  --references=N    let the first refer to the first N inputs
  --tree            all a nar can hold: directories, executables, links…
  --bytes           file names and link targets that are not UTF-8
  --flat            each is a file rather than a directory
")

(define option-spec
  '((help) (chain) (silent) (fail) (die) (tree) (compressible)
    (bytes) (flat) (local)
    (count (value #t)) (name (value #t)) (seed (value #t)) (system (value #t))
    (features (value #t)) (inputs (value #t)) (input-size (value #t))
    (input-files (value #t)) (text-inputs (value #t)) (seconds (value #t))
    (loops (value #t)) (log-lines (value #t)) (outputs (value #t)) (output-size (value #t))
    (references (value #t)) (scratch-size (value #t)) (output-files (value #t)) (print (value #t))))

(define builder-script "\
set -e
say() { [ -n \"$silent\" ] || echo \"$@\"; }

# Whatever was sent must be there.
for input; do
    [ -e \"$input\" ] || { echo \"missing input: $input\"; exit 1; }
done

say \"building $name\"
[ \"$scratch\" = 0 ] || head -c \"$scratch\" /dev/zero >scratch
if [ \"$lines\" = 0 ]; then
    sleep \"$pause\"
else
    n=0
    while [ $n -lt \"$lines\" ]; do
        n=$((n + 1))
        echo \"line $n of $lines\"
        [ \"$pause\" = 0 ] || sleep \"$pause\"
    done
fi
n=0
while [ $n -lt \"$loops\" ]; do n=$((n + 1)); done
[ -z \"$print\" ] || cat \"$print\"
if [ -n \"$die\" ]; then
    ulimit -t 1
    while :; do :; done
fi
if [ -n \"$fail\" ]; then
    say 'failing, as told to'
    exit 1
fi

refer() {
    for input; do
        [ $left -gt 0 ] || break
        left=$((left - 1))
        echo \"$input\"
    done
}

data() {
    noise=$size
    if [ -n \"$compressible\" ]; then
        noise=$((size / 3))
        head -c $((size - noise)) /dev/zero
    fi
    [ \"$noise\" = 0 ] || head -c \"$noise\" /dev/urandom
}

grow_tree() {
    mkdir -p bin empty-directory deep/er/still 'name with spaces'
    printf '#!%s/bin/sh\\necho hello\\n' \"$busybox\" >bin/hello
    chmod +x bin/hello
    : >empty-file
    echo same >twin-a
    echo same >twin-b
    echo upper >Upper
    echo accent >\"$(printf 'caf\\303\\251')\"
    ln -s nowhere dangling
    ln -s ../../bin/hello deep/er/relative
    ln -s \"$busybox/bin/busybox\" absolute
    ln -s \"$path/bin\" own
}

grow_bytes() {
    echo latin >\"$(printf 'caf\\351')\"
    ln -s \"$(printf 'to-\\377\\376')\" bytes-link
}

# $path, $next (the output to refer to, if any), $left (references to make).
make_output() {
    if [ -n \"$flat\" ]; then
        { echo \"$name $seed $next\"; refer \"$@\"; data; } >\"$path\"
        return
    fi
    mkdir \"$path\"
    cd \"$path\"
    echo \"$name $seed $next\" >result
    refer \"$@\" >references
    data >data
    n=0
    while [ $n -lt \"$files\" ]; do
        n=$((n + 1))
        printf x >file-$n
    done
    [ -z \"$tree\" ] || grow_tree
    [ -z \"$bytes\" ] || grow_bytes
}

left=$references
for output in $outputs; do
    next=
    for other in $outputs; do
        [ \"$next\" != found ] || eval \"next=\\$$other\"
        [ \"$other\" != \"$output\" ] || next=found
    done
    [ \"$next\" != found ] || next=
    eval \"path=\\$$output\"
    make_output \"$@\"
    left=0
done
say \"built $name\"
")

(define (fresh-seed)
  (number->string (random (expt 2 64) (random-state-from-platform)) 32))

(define (write-random size state port)
  "Write SIZE incompressible bytes that depend on STATE to PORT."
  (let ((chunk (min size 1048576)))
    (when (> chunk 0)
      (let ((bytes (make-bytevector chunk)))
        (bytevector-uint-set! bytes 0 (random (expt 256 chunk) state)
                              (endianness little) chunk)
        (put-bytevector port bytes))
      (write-random (- size chunk) state port))))

(define* (write-random-file file size state #:optional (zeros 0))
  (call-with-output-file file
    (lambda (port)
      (put-bytevector port (make-bytevector zeros 0))
      (write-random size state port))
    #:binary #t))

(define (make-file-input store name size zeros state)
  (call-with-temporary-directory
   (lambda (directory)
     (let ((file (string-append directory "/" name)))
       (write-random-file file (- size zeros) state zeros)
       (add-to-store store name #f "sha256" file)))))

(define (make-directory-input store name count state)
  (call-with-temporary-directory
   (lambda (directory)
     (for-each (lambda (n)
                 (write-random-file (string-append directory "/file-"
                                                   (number->string n))
                                    64 state))
               (iota count))
     (add-to-store store name #t "sha256" directory))))

(define (make-inputs store options id)
  "Make the inputs, to be found nowhere else, of the derivation with seed ID."
  (define state (seed->random-state id))
  (define (name n)
    (format #f "~a-input-~a" (string-option options 'name "work") n))
  (define size (number-option options 'input-size 64))
  (define zeros
    (if (option-ref options 'compressible #f)
        (- size (quotient size 3))
        0))
  (append
   (map (lambda (n)
          (make-file-input store (name n) size zeros state))
        (iota (number-option options 'inputs 0)))
   (map (lambda (n)
          (add-text-to-store store (string-append (name n) ".txt")
                             (string-append id " " (name n) "\n") '()))
        (iota (number-option options 'text-inputs 0)))
   (match (number-option options 'input-files 0)
     (0 '())
     (count (list (make-directory-input store (name 'files) count state))))))

(define (string-option options name default)
  (option-ref options name default))

(define (number-option options name default)
  (match (option-ref options name #f)
    (#f default)
    (text
     (or (string->number text)
         (begin
           (format (current-error-port) "work.scm: error: \
--~a wants a number, not '~a'~%" name text)
           (exit 1))))))

(define (list-option options name default)
  (string-tokenize (option-ref options name default)
                   (char-set-complement (char-set #\,))))

(define (decimal number)
  "Return NUMBER as 'sleep' reads it: no fraction, no exponent."
  (let ((thousandths (inexact->exact (round (* 1000 number)))))
    (if (zero? (modulo thousandths 1000))
        (number->string (quotient thousandths 1000))
        (string-append (number->string (quotient thousandths 1000)) "."
                       (string-pad (number->string
                                    (modulo thousandths 1000))
                                   3 #\0)))))

(define (build-environment options id busybox)
  (define (flag name)
    (if (option-ref options name #f) "1" ""))
  (define lines (number-option options 'log-lines 0))
  (define pause (/ (number-option options 'seconds 0) (max 1 lines)))

  `(("PATH" . ,(string-append busybox "/bin"))
    ("busybox" . ,busybox)
    ("name" . ,(string-option options 'name "work"))
    ("seed" . ,id)
    ("lines" . ,(number->string lines))
    ("pause" . ,(decimal pause))
    ("loops" . ,(car (list-option options 'loops "0")))
    ("size" . ,(number->string (number-option options 'output-size 0)))
    ("scratch" . ,(number->string (number-option options 'scratch-size 0)))
    ("files" . ,(number->string (number-option options 'output-files 0)))
    ("references" . ,(number->string (number-option options 'references 0)))
    ("outputs" . ,(string-join (list-option options 'outputs "out")))
    ("print" . ,(string-option options 'print ""))
    ,@(map (lambda (name)
             (cons (symbol->string name) (flag name)))
           '(silent fail die tree bytes flat compressible))
    ,@(match (list-option options 'features "")
        (() '())
        (features
         `(("requiredSystemFeatures" . ,(string-join features)))))))

(define (make-work store options id previous)
  "Make the derivation with seed ID, which depends on PREVIOUS, a derivation,
unless that is #f."
  (define busybox
    (add-to-store store "busybox" #t "sha256" "/opt/work/busybox"))
  (define script
    (add-text-to-store store "work-builder" builder-script '()))
  (define inputs (make-inputs store options id))

  (derivation store (string-option options 'name "work")
              (string-append busybox "/bin/sh")
              (cons script
                    (append (if previous
                                (list (derivation->output-path previous))
                                '())
                            inputs))
              #:system (string-option options 'system (%current-system))
              #:local-build? (option-ref options 'local #f)
              #:env-vars (build-environment options id busybox)
              #:inputs (if previous
                           (list (derivation-input previous '("out")))
                           '())
              #:sources (cons* busybox script inputs)
              #:outputs (list-option options 'outputs "out")))

(define (options-of options n)
  "Return OPTIONS for the Nth derivation, which has a number of loops."
  (match (list-option options 'loops "")
    (() options)
    (loops
     (let ((name (string-option options 'name "work")))
       (cons* (cons 'loops (list-ref loops (modulo n (length loops))))
              (cons 'name (format #f "~a-~a" name n))
              options)))))

(define (make-all arguments)
  (define options (getopt-long arguments option-spec))
  (define seed (option-ref options 'seed (fresh-seed)))
  (define chain? (option-ref options 'chain #f))

  (if (option-ref options 'help #f)
      (display usage)
      (with-store store
        (fold (lambda (n previous)
                (let ((drv (make-work store (options-of options n)
                                      (string-append seed "-"
                                                     (number->string n))
                                      previous)))
                  (format #t "~a~%" (derivation-file-name drv))
                  (and chain? drv)))
              #f
              (iota (number-option options 'count 1))))))

(define (answer fifo name arguments)
  "Make what ARGUMENTS ask for, and tell it in the file that NAME names."
  (define file (string-append fifo "." name))
  (define output (open-output-string))
  (define done?
    (catch #t
      (lambda ()
        (with-output-to-port output
          (lambda ()
            (with-error-to-port output
              (lambda () (make-all (cons "work.scm" arguments))))))
        #t)
      (lambda (key . arguments)
        (format output "~a: ~s~%" key arguments)
        #f)))
  (call-with-output-file (string-append file ".new")
    (lambda (port)
      (format port "~a~%~a" (if done? "done" "failed")
              (get-output-string output))))
  (rename-file (string-append file ".new") file))

(define (serve fifo)
  (mknod fifo 'fifo #o600 0)
  ;; Open for writing, too, it never comes to an end.
  (let ((port (fdopen (open-fdes fifo O_RDWR) "r")))
    (let loop ()
      (match (read port)
        ((name . arguments) (answer fifo name arguments)))
      (loop))))

(setlocale LC_ALL "")
(match (command-line)
  ((_ (? (cut string-prefix? "--serve=" <>) option))
   (serve (string-drop option (string-length "--serve="))))
  (arguments (make-all arguments)))
