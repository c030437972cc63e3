# take_fa.ps1 ARCHIVES TARGET: the FA map out of each subject's archives, named by its ID
param(
    [Parameter(Mandatory = $true)] [string] $Source,
    [Parameter(Mandatory = $true)] [string] $Target
)
$ErrorActionPreference = 'Stop'
Add-Type -AssemblyName System.IO.Compression
Add-Type -AssemblyName System.IO.Compression.FileSystem

function Copy-Entry($Entry, [string] $Path) {
    $reader = $Entry.Open()
    try {
        $writer = [System.IO.File]::Create($Path)
        try { $reader.CopyTo($writer) } finally { $writer.Dispose() }
    } finally { $reader.Dispose() }
    if ((New-Object System.IO.FileInfo $Path).Length -ne $Entry.Length) {
        throw "$($Entry.FullName): shorter or longer than its archive declares"
    }
}

# Copies FA maps to $partial and gives their names, those of the archives within too. An inner
# archive becomes a temporary file: from a stream, ZipArchive would read all of it into memory.
function Get-Fa([string] $Archive) {
    $zip = [System.IO.Compression.ZipFile]::OpenRead($Archive)
    try {
        foreach ($entry in $zip.Entries) {
            if ($entry.FullName -match '(^|[/\\])(__MACOSX[/\\]|\._)') { continue }
            if ($entry.Name -match '\.zip$' -and $Archive -ne $inner) {
                Copy-Entry $entry $inner
                Get-Fa $inner
            } elseif ($entry.Name -match '^(.*_)?FA\.nii(\.gz)?$') {
                Copy-Entry $entry $partial
                $entry.Name
            }
        }
    } finally { $zip.Dispose() }
}

$Source = (Resolve-Path -LiteralPath $Source).ProviderPath
$Target = (New-Item -ItemType Directory -Force -Path $Target).FullName
$partial = Join-Path $Target '.partial'
$inner = Join-Path $Target '.inner.zip'
$rejected = New-Object System.Collections.ArrayList
$subjects = Get-ChildItem -LiteralPath $Source -Recurse -File |
    Where-Object { $_.Extension -eq '.zip' -and $_.Name -match '^[0-9A-Za-z]' } |
    Group-Object { [regex]::Match($_.Name, '^[0-9A-Za-z]+').Value } | Sort-Object Name
foreach ($subject in $subjects) {
    $volume = Join-Path $Target "$($subject.Name).nii"
    if ((Test-Path -LiteralPath $volume) -or (Test-Path -LiteralPath "$volume.gz")) { continue }
    try {
        $found = @($subject.Group | Sort-Object FullName | ForEach-Object { Get-Fa $_.FullName })
        if ($found.Count -ne 1) {
            throw "expected one FA map, found $($found.Count); HCP ships none: fit it"
        }
        if ($found[0] -match 'gz$') { $volume = "$volume.gz" }
        Move-Item -LiteralPath $partial -Destination $volume
    } catch {
        $reason = $_.Exception.Message
        Write-Warning "$($subject.Name): $reason"
        [void] $rejected.Add(('{0},"{1}"' -f $subject.Name, $reason.Replace('"', '""')))
    } finally {
        foreach ($file in $partial, $inner) {
            if (Test-Path -LiteralPath $file) { Remove-Item -LiteralPath $file -Force }
        }
    }
}
Set-Content -LiteralPath (Join-Path $Target 'rejected.csv') -Encoding UTF8 -Value (@('Subject,reason') + $rejected)
