;;; A package of Offload for Guix, of the release that this file is a part of or,
;;; in a checkout, of the one that scripts/bundle has made.
;;;
;;;   guix package -f guix.scm
;;;
;;; Its lib/offload/guix is what guix-daemon's variable GUIX is to name.

(use-modules (gnu packages)
             (guix build-system trivial)
             (guix gexp)
             ((guix licenses) #:prefix license:)
             (guix packages)
             (ice-9 regex)
             (ice-9 textual-ports)
             (srfi srfi-1))

(define release
  (let ((here (dirname (current-filename))))
    (or (find (lambda (directory)
                (file-exists? (string-append directory "/offload.mjs")))
              (list here (string-append here "/../dist")))
        (error "there is no release here: make one with 'scripts/bundle'"))))

;; The manual page begins with it.
(define version
  (match:substring
   (string-match "Offload ([0-9.]+)"
                 (call-with-input-file (string-append release "/offload.1")
                   get-string-all))
   1))

(package
  (name "offload")
  (version version)
  (source (local-file release "offload-release" #:recursive? #t))
  (build-system trivial-build-system)
  (arguments
   (list
    #:modules '((guix build utils))
    #:builder
    #~(begin
        (use-modules (guix build utils)
                     (ice-9 popen)
                     (ice-9 textual-ports)
                     (srfi srfi-26))
        (define lib (string-append #$output "/lib/offload"))
        (define node (string-append #$(this-package-input "node") "/bin/node"))
        (define (install file directory)
          (install-file (string-append #$source "/" file) directory))
        (for-each (cut install <> lib)
                  '("guix" "offload" "offload.mjs" "runtime.sh"))
        (install "offload.1" (string-append #$output "/share/man/man1"))
        ;; The one that it is started with, whatever there is in PATH.
        (symlink node (string-append lib "/runtime"))
        (mkdir-p (string-append #$output "/bin"))
        (symlink "../lib/offload/offload"
                 (string-append #$output "/bin/offload"))
        (setenv "HOME" (getcwd))
        (for-each
         (lambda (shell file)
           (let* ((file (string-append #$output "/share/" file))
                  (pipe (open-pipe* OPEN_READ node
                                    (string-append lib "/offload.mjs")
                                    "completion" shell))
                  (text (get-string-all pipe)))
             (unless (zero? (close-pipe pipe))
               (error "failed to make the completion for" shell))
             (mkdir-p (dirname file))
             (call-with-output-file file (cut display text <>))))
         '("bash" "zsh" "fish")
         '("bash-completion/completions/offload"
           "zsh/site-functions/_offload"
           "fish/vendor_completions.d/offload.fish")))))
  (inputs (list (specification->package "node")))
  (home-page #f)
  (synopsis "Build hook that offloads builds to other machines over SSH")
  (description
   "Offload is a drop-in replacement for @command{guix offload}, the build hook
with which @command{guix-daemon} sends builds to other machines.  It reads the
same machine file, uses the same keys and slots, and carries on where a machine
hangs or fails.")
  (license license:expat))
