;;; Prints what there is to build for packages, from nothing: a line for each
;;; derivation, behind those that it needs, with tabs between
;;;
;;;   NAME, then "local" where guix-daemon builds it itself (downloads, say)
;;;   or "-", then the numbers of the lines that it needs, with spaces between
;;;
;;; and, at the end, a line "PACKAGE <tab> = <tab> NUMBER" for each package.
;;; Nothing is built or fetched.  Run it as `guix repl -- graph.scm PACKAGE...`.

(use-modules (gnu packages)
             (guix derivations)
             (guix packages)
             (guix store)
             (ice-9 format)
             (srfi srfi-1))

(define numbers (make-hash-table))

(define (local? drv)
  (let ((variables (derivation-builder-environment-vars drv)))
    (equal? (assoc-ref variables "preferLocalBuild") "1")))

(define (name-of drv)
  ;; Without the directory, the hash and ".drv".
  (let ((base (basename (derivation-file-name drv) ".drv")))
    (substring base 33)))

(define (print drv)
  "Print what DRV needs and DRV, unless that was done; return its number."
  (let ((file (derivation-file-name drv)))
    (or (hash-ref numbers file)
        (let* ((inputs (map (compose print derivation-input-derivation)
                            (derivation-inputs drv)))
               (number (hash-count (const #t) numbers)))
          (hash-set! numbers file number)
          (format #t "~a\t~a\t~{~a~^ ~}~%" (name-of drv)
                  (if (local? drv) "local" "-")
                  (delete-duplicates (sort inputs <)))
          number))))

(with-store store
  (let ((ends (map (lambda (name)
                     (let ((package (specification->package name)))
                       (cons name
                             (print (package-derivation store package
                                                        #:graft? #f)))))
                   (cdr (command-line)))))
    (for-each (lambda (end)
                (format #t "~a\t=\t~a~%" (car end) (cdr end)))
              ends)))
