# What .ci/setup and the other .ci/setup-* scripts share: to be sourced in the project's root.

fail() { printf '%s\n' "$@" >&2; exit 1; }

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
    local candidate pyenv_root
    pyenv_root=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
    for candidate in python3.12 python3.13 python3 python \
        "$pyenv_root"/versions/3.12*/bin/python "$pyenv_root"/versions/3.13*/bin/python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "No Python 3.12 or newer (with its venv module) was found on PATH or among pyenv's versions." \
        "Install one, for example: apt install python3.12-venv, brew install python@3.12, or" \
        "pyenv install 3.12. To use an environment of your own: make PYTHON=/path/to/python ..."
}

requirements() { # of the core and of the extras named, one per line
    "$python" - "$@" <<'PYTHON'
import pathlib, sys, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
PYTHON
}

show_time() { # until this script ends
    while kill -0 $$ 2>/dev/null; do
        if [ -t 2 ]; then printf '\r  %d:%02d ' $((SECONDS / 60)) $((SECONDS % 60)) >&2; fi
        sleep 1
    done
}

key() { # of what stands on stdin
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])'
}

prepare() { # environment $1, about $2 large, which `install` fills; print its Python
    local cache environment log
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/mor-layers
    environment=$cache/$1
    if [ ! -e "$environment" ]; then
        mkdir -p "$cache"
        rm -f "$environment" # a link whose folder is gone
        folder=$(mktemp -d "$environment.XXXXXX")
        log=$folder.log
        echo "Installing the dependencies into $cache (once; about $2, a few minutes)" >&2
        show_time &
        trap 'rm -rf "$folder"; kill $! 2>/dev/null || true' EXIT
        trap 'exit 130' INT TERM
        install "$folder" >"$log" 2>&1 || fail "" "$(tail -n 15 "$log")" "" \
            "The dependencies could not be installed; $log has the whole account."
        rm "$log"
        # Another make may have finished the same environment meanwhile: then that one is used.
        if ln -sn "$(basename "$folder")" "$environment" 2>/dev/null; then folder=; fi
        if [ -t 2 ]; then printf '\r' >&2; fi
    fi
    echo "$environment/bin/python"
}

prepare_on_top() { # environment $1 of the packages $2 on top of .ci/setup's, about $3 large; print its Python
    base=$(.ci/setup)
    python=$base packages=$2
    install() { # into folder $1; the other environment is found through a .pth file
        "$base" -m venv --without-pip "$1" &&
            "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
                >"$(echo "$1"/lib/python3.*/site-packages)/base.pth" &&
            "$base" -m pip --python "$1/bin/python" --disable-pip-version-check install \
                --progress-bar off --no-deps --no-build-isolation $packages
    }
    prepare "$1-$(echo "$base $packages" | key)" "$3"
}
