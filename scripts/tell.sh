# Says what is left to do, for install.sh, which reads this.

# Says what to do where there is no systemd.
explain_switch() {
    ! uses_offload "$daemon" || { echo "guix-daemon uses Offload already"; return 0; }
    echo
    echo "To have guix-daemon use Offload, start it with GUIX in its environment:"
    if [ -e /run/current-system/profile ]; then
        cat <<END

On Guix System, in the operating-system declaration, then run 'guix system
reconfigure' and 'herd restart guix-daemon':
    (modify-services %base-services
      (guix-service-type config =>
        (guix-configuration
          (inherit config)
          (environment '("GUIX=$lib/guix")))))
END
    elif [ -d /run/openrc ]; then
        cat <<END

Under OpenRC, add this line to /etc/conf.d/guix-daemon, then run 'rc-service
guix-daemon restart':
    export GUIX=$lib/guix
END
    elif [ -e /etc/init.d/guix-daemon ]; then
        cat <<END

Under sysvinit, add this line to /etc/init.d/guix-daemon, below the comments at
its head, then run 'service guix-daemon restart':
    export GUIX=$lib/guix
END
    fi
    cat <<END

By hand, as root:
    env GUIX=$lib/guix $(command_of "$daemon")
END
}

# AppArmor lets a daemon that Guix itself installed start what is in the store.
explain_confinement() {
    [ -n "$daemon" ] || return 0
    case $(cat "/proc/$daemon/attr/current" 2>/dev/null) in
    guix-daemon*enforce*) cat <<END

AppArmor confines guix-daemon: add this line to /etc/apparmor.d/local/guix-daemon,
then run 'apparmor_parser -r /etc/apparmor.d/guix-daemon':
    $lib/guix Ux,
END
    esac
}

# The command, as it can be typed here.
command_here() {
    case :$PATH: in
    *:"$prefix/bin":*) echo offload ;;
    *) echo "$prefix/bin/offload" ;;
    esac
}

test_machines() {
    machines=${GUIX_CONFIGURATION_DIRECTORY:-/etc/guix}/machines.scm
    if [ ! -s "$machines" ]; then cat <<END
No build machine is listed yet.  To set one up, on which guix-daemon runs, type
    $(command_here) trust root@HOST --file $machines
END
    elif [ -n "$dry_run" ]; then echo "would run offload test"
    else
        echo "offload test:"
        # What a runtime keeps is not to be left in somebody's home.
        (export DENO_DIR="$work/deno" && as_daemon "exec $prefix/bin/offload test") ||
            echo "Offload is installed, but not all is well with the build machines."
    fi
}
