;;; A package of Offload for Guix, of the release that this file is a part of, or
;;; that scripts/release has made of the checkout it is in.
;;;
;;;   guix package -f guix.scm
;;;
;;; Its lib/offload/guix is what guix-daemon's variable GUIX is to name.

(define-module (offload)
  #:use-module ((gcrypt hash) #:select (file-sha256))
  #:use-module (gnu packages)
  #:use-module (guix base16)
  #:use-module (guix build-system trivial)
  #:use-module (guix download)
  #:use-module (guix gexp)
  #:use-module ((guix licenses) #:prefix license:)
  #:use-module (guix packages))

;; Files beside this one.
(define (here file)
  (string-append (dirname (current-filename)) "/" file))

;; What is between @ signs is filled in by scripts/release.
(define version "@VERSION@")

;; The archive, which is also the package for npm.
(define archive (string-append "guix-offload-" version ".tgz"))
(define sha256sum "@SHA256@")

;; Where the release is, for who has this file alone; it may be empty.
(define url "@URL@")

(define (release)
  (let ((file (here archive)))
    (cond ((file-exists? file)
           (unless (string=? sha256sum
                             (bytevector->base16-string (file-sha256 file)))
             (error "it is not of the same release:" file))
           (local-file file))
          ((string-null? url)
           (error "there is no archive beside guix.scm:" file))
          (else
           (origin
             (method url-fetch)
             (uri (string-append url "/" archive))
             (sha256 (base16-string->bytevector sha256sum)))))))

(define (offload)
  (package
    (name "offload")
    (version version)
    (source (release))
    (build-system trivial-build-system)
    (arguments
     (list
      #:modules '((guix build utils))
      #:builder
      #~(begin
          (use-modules (guix build utils))
          (define lib (string-append #$output "/lib/offload"))
          (define share (string-append #$output "/share/"))
          (define (copy file place)
            (mkdir-p (dirname place))
            (copy-file (string-append "package/dist/" file) place))
          (setenv "PATH"
                  (string-append #$(this-package-native-input "gzip") "/bin"))
          (invoke #$(file-append (this-package-native-input "tar") "/bin/tar")
                  "xzf" #$source)
          (for-each (lambda (file)
                      (copy file (string-append lib "/" file)))
                    '("guix" "offload" "offload.mjs" "runtime.sh"
                      "offload.d.mts" "contract.mjs" "contract.d.mts"
                      "machines.schema.json" "settings.schema.json"))
          (for-each (lambda (file place)
                      (copy file (string-append share place)))
                    '("offload.1" "offload.bash" "offload.zsh" "offload.fish")
                    '("man/man1/offload.1"
                      "bash-completion/completions/offload"
                      "zsh/site-functions/_offload"
                      "fish/vendor_completions.d/offload.fish"))
          ;; The one that it is started with, whatever there is in PATH.
          (symlink #$(file-append (this-package-input "node") "/bin/node")
                   (string-append lib "/runtime"))
          (mkdir-p (string-append #$output "/bin"))
          (symlink "../lib/offload/offload"
                   (string-append #$output "/bin/offload")))))
    (native-inputs (map specification->package '("gzip" "tar")))
    (inputs (list (specification->package "node")))
    (home-page #f)
    (synopsis "Build hook that offloads builds to other machines over SSH")
    (description
     "Offload is a drop-in replacement for @command{guix offload}, the build hook
with which @command{guix-daemon} sends builds to other machines.  It reads the
same machine file, uses the same keys and slots, and carries on where a machine
hangs or fails.")
    (license license:expat)))

(if (string-prefix? "@" version)
    (let ((made (here "../dist/guix.scm")))
      (unless (file-exists? made)
        (error "run scripts/release first, which makes it:" made))
      (load made))
    (offload))
