# fit_fa.sh SOURCE TARGET: an FA map a subject from HCP's diffusion packages, zipped or loose
set -u
export FSLOUTPUTTYPE=NIFTI_GZ
mkdir -p "$2" && target=$(cd "$2" && pwd) || exit
keep='NR == FNR { for (i = 1; i <= NF; i++) if ($i <= 1500) column[++n] = i; next }
      { for (i = 1; i <= n; i++) printf "%s ", $column[i]; print "" }'

fit() { # ID, in a folder with its data, bvals, bvecs and nodif_brain_mask
    awk "$keep" bvals bvals >low.bvals && awk "$keep" bvals bvecs >low.bvecs &&
        volumes=$(awk '{ for (i = 1; i <= NF; i++) if ($i <= 1500) printf "%s%d", (n++ ? "," : ""), i - 1 }' bvals) &&
        fslselectvols -i data -o low --vols="$volumes" &&
        dtifit --wls -k low -m nodif_brain_mask -r low.bvecs -b low.bvals -o "$1" &&
        mv "$1_FA.nii.gz" "$target/$1.nii.gz"
}

get() { # SOURCE FOLDER
    case $1 in
    *.zip)
        unzip -q -j "$1" '*/T1w/Diffusion/data.nii.gz' '*/T1w/Diffusion/bv[ae][lc]s' \
            '*/T1w/Diffusion/nodif_brain_mask.nii.gz' -d "$2" ;;
    *) ln -s "$(cd "$1" && pwd)"/{data.nii.gz,bvals,bvecs,nodif_brain_mask.nii.gz} "$2" ;;
    esac
}

for item in "$1"/*_3T_Diffusion_preproc.zip "$1"/*_Diffusion3TRecommended.zip "$1"/*/T1w/Diffusion; do
    id=${item%/T1w/Diffusion} && id=${id##*/} && id=${id%%_*}
    if [ ! -e "$item" ] || [ -e "$target/$id.nii.gz" ]; then continue; fi
    folder=$(mktemp -d "$target/.fit.XXXXXX") || exit
    get "$item" "$folder" && (cd "$folder" && fit "$id") ||
        echo "$id: no FA map, see the messages above" >&2
    rm -rf "$folder"
done
