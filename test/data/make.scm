;;; make.scm - what make.ts runs in the hosts.
;;;
;;;   guix repl -- make.scm talk SOCKET DRV OUTPUT FAILING-DRV
;;;   guix repl -- make.scm sign TEXT
;;;
;;; `talk` holds conversations with the daemon at SOCKET, each over its own
;;; connection, and prints the name of each.  `sign` makes keys of all kinds,
;;; signs TEXT with them and prints, as JSON, both.

(use-modules (guix store)
             (guix derivations)
             (guix pki)
             (gcrypt hash)
             (gcrypt pk-crypto)
             (ice-9 match)
             (json)
             (rnrs bytevectors)
             (rnrs io ports)
             (srfi srfi-34))

(define query-valid-paths
  ;; Guix's own client lacks it.
  ((@@ (guix store) operation) (query-valid-paths (store-path-list paths))
   "Return those of PATHS that are valid."
   store-path-list))

(define (export store item)
  (call-with-values open-bytevector-output-port
    (lambda (port get-bytes)
      ((@@ (guix store) export-path) store item port)
      (get-bytes))))

(define (talk socket drv output failing-drv)
  (define missing
    (string-append (%store-prefix) "/" (make-string 32 #\0) "-missing"))
  (define (hold name procedure)
    (let ((store (open-connection (string-append "unix://" socket))))
      (format #t "~a~%" name)
      (guard (c ((store-protocol-error? c) #t))
        (procedure store))
      (close-connection store)))

  (hold "handshake" (const #t))
  (hold "set-options"
        (lambda (store)
          (set-build-options store #:offload? #f
                             #:timeout 86400 #:max-silent-time 3600)))
  (hold "add-text-to-store"
        (lambda (store)
          (add-text-to-store store "golden.txt" "some text\n" (list drv))))
  (hold "add-temp-root" (lambda (store) (add-temp-root store drv)))
  (hold "query-valid-paths"
        (lambda (store) (query-valid-paths store (list missing drv))))
  (hold "query-path-info" (lambda (store) (query-path-info store drv)))
  (hold "error" (lambda (store) (query-path-info store missing)))
  (hold "build-things" (lambda (store) (build-things store (list drv))))
  (hold "build-failure"
        (lambda (store) (build-things store (list failing-drv))))
  (hold "export-path" (lambda (store) (export store output)))
  (hold "import-paths"
        (lambda (store)
          (let* ((item (with-store direct
                         (add-text-to-store direct "imported" "this\n")))
                 (bundle (with-store direct
                           (call-with-values open-bytevector-output-port
                             (lambda (port get-bytes)
                               (export-paths direct (list item) port)
                               (get-bytes))))))
            (import-paths store (open-bytevector-input-port bundle))))))

(define kinds
  '(("ecdsa" ecc "(genkey (ecdsa (curve Ed25519) (flags rfc6979)))")
    ("other" ecc "(genkey (ecdsa (curve Ed25519) (flags rfc6979)))")
    ("rsa" rsa "(genkey (rsa (nbits 4:2048)))")
    ("nist" ecc "(genkey (ecdsa (curve \"NIST P-256\") (flags rfc6979)))")
    ("eddsa" #f "(genkey (ecc (curve Ed25519) (flags eddsa)))")))

(define (sign-all text)
  (define hash (sha256 (string->utf8 text)))
  (scm->json
   (map (match-lambda
          ((name type parameters)
           (let* ((pair (generate-key (string->canonical-sexp parameters)))
                  (public (find-sexp-token pair 'public-key))
                  (secret (find-sexp-token pair 'private-key)))
             `(,name
               ("key" . ,(canonical-sexp->string public))
               ;; Guix can't sign with an EdDSA key.
               ,@(if type
                     `(("signature"
                        . ,(canonical-sexp->string
                            (signature-sexp
                             (bytevector->hash-data hash #:key-type type)
                             secret public))))
                     '())))))
        kinds)))

(match (cdr (command-line))
  (("talk" arguments ...) (apply talk arguments))
  (("sign" text) (sign-all text)))
