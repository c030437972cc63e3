# take_fa.sh ARCHIVES TARGET: the FA map out of each subject's archives, named by its ID
set -u
mkdir -p "$2" && source=$(cd "$1" && pwd) && target=$(cd "$2" && pwd) || exit
partial=$target/.partial inner=$target/.inner.zip rejected=$target/rejected.csv
trap 'rm -f "$partial" "$inner"' EXIT

copy() { # ARCHIVE MEMBER FILE; unzip takes a member for a pattern, and 1 is but a warning
    unzip -p -P '' "$1" "$(printf '%s' "$2" | sed 's/[][*?\\]/\\&/g')" >"$3" 2>/dev/null </dev/null
    [ $? -le 1 ] || { reason="$label/$2: damaged or encrypted, or the disk is full"; return 1; }
}

look() { # ARCHIVE LABEL: copy FA maps to $partial and count them, in the archives within too
    local names name label=$2
    names=$(unzip -Z1 "$1" 2>/dev/null) || { reason="$label: not a whole zip archive"; return 1; }
    while IFS= read -r name; do
        case $name in
        *.[zZ][iI][pP])
            [ "$1" = "$inner" ] && continue # one level of nesting
            copy "$1" "$name" "$inner" && look "$inner" "$label/$name" || return ;;
        *)
            copy "$1" "$name" "$partial" || return
            found=$((found + 1)) suffix=.nii
            case $name in *[zZ]) suffix=.nii.gz ;; esac ;;
        esac
    done < <(printf '%s\n' "$names" | grep -Ev '(^|/)(__MACOSX/|\._)' |
        grep -Ei '\.zip$|(^|/)([^/]*_)?FA\.nii(\.gz)?$')
}

echo Subject,reason >"$rejected"
for id in $(find -L "$source" -type f -iname '*.zip' | sed 's|.*/||' | grep -oE '^[0-9A-Za-z]+' | sort -u); do
    if [ -e "$target/$id.nii.gz" ] || [ -e "$target/$id.nii" ]; then continue; fi
    found=0 reason=
    while IFS= read -r archive; do
        look "$archive" "${archive#"$source"/}" || break
    done < <(find -L "$source" -type f \( -iname "$id.zip" -o -iname "${id}[!0-9A-Za-z]*.zip" \) | sort)
    if [ -z "$reason" ] && [ "$found" -ne 1 ]; then
        reason="expected one FA map, found $found; HCP ships none: fit it"
    fi
    if [ -z "$reason" ] && mv "$partial" "$target/$id$suffix"; then continue; fi
    printf '%s,"%s"\n' "$id" "${reason//\"/\"\"}" | tee -a "$rejected" >&2
done
