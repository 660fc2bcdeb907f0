package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A recipe says what to fetch for a relay: Debian packages; npm packages, and the versions for old Node.js; a version of go-smtp.
type recipe struct {
	debs   []string // Debian packages, without their dependencies
	npm    []npmPackage
	goSMTP string // version of go-smtp to build [goSMTPServer] with
}

// npmPackage is pinned, so that every run of the suite tests the same relay. Debian 12's own Node.js is 18.
type npmPackage struct {
	name           string
	version        string
	versionNode18  string // the last one that ran on Node.js 18
	newestNeedNode int    // the major version of Node.js that version needs
}

// fetched is a relay in the cache, ready to be mounted.
type fetched struct {
	Name    string
	Debs    []string // folders of Debian packages, to be unpacked and laid over the machine's own root
	Modules string   // the folder with node_modules; "" if there is none
	Server  string   // a program that is copied to /etc/relay/server; "" if there is none
	Version string
	Missing string // why it is unavailable; "" if it is available
}

// fetch brings a relay into the cache in dir; a later run takes it from there without a registry.
func fetch(ctx context.Context, dir string, r relay) (fetched, error) {
	f := fetched{Name: r.name}
	if len(r.debs) > 0 {
		debs := filepath.Join(dir, "debs", r.name)
		version, err := downloadDebs(ctx, debs, r.debs)
		if err != nil {
			return f, err
		}
		f.Version = version
		f.Debs = append(f.Debs, debs)
	}
	if r.goSMTP != "" {
		f.Version = r.goSMTP
		var err error
		f.Server, err = buildGoSMTP(ctx, filepath.Join(dir, "go", r.name), r.goSMTP)
		return f, err
	}
	if len(r.npm) == 0 {
		return f, nil
	}
	if !has("node") || !has("npm") {
		debs := filepath.Join(dir, "debs", "node")
		if _, err := downloadDebs(ctx, debs, []string{"nodejs", "npm"}); err != nil {
			return f, err
		}
		f.Debs = append(f.Debs, debs)
	}
	f.Modules = filepath.Join(dir, "npm", r.name)
	var err error
	f.Version, err = installModules(ctx, dir, f, r.npm)
	return f, err
}

func has(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

// downloadDebs downloads packages, and those of their dependencies that the machine lacks, into a folder, and returns the version
// of the first. It installs nothing: Debian's mail servers conflict when installed, and a test must not replace the machine's
// own.
func downloadDebs(ctx context.Context, dir string, packages []string) (version string, err error) {
	stamp := filepath.Join(dir, "complete") // written last: an interrupted run leaves none
	if b, err := os.ReadFile(stamp); err == nil {
		if what, version, _ := strings.Cut(strings.TrimSpace(string(b)), "\n"); what == strings.Join(packages, " ") {
			return version, nil
		}
	}
	for _, tool := range []string{"apt-get", "dpkg"} {
		if !has(tool) {
			return "", fmt.Errorf("%s is not installed: the relays come as Debian packages", tool)
		}
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "partial"), 0o755)); err != nil {
		return "", err
	}
	download := func() error {
		return command(ctx, "apt-get", append([]string{"install", "--download-only", "--yes", "-qq", "--no-install-recommends",
			"-o", "Dir::Cache::archives=" + dir, "-o", "APT::Sandbox::User=root"}, packages...)...)
	}
	if err = download(); err != nil {
		// Missing or outdated lists name packages that the archive no longer has.
		if err := command(ctx, "apt-get", "update", "-qq"); err != nil {
			return "", err
		}
		err = download()
	}
	if err != nil {
		return "", err
	}
	files, err := debFiles(dir)
	if err != nil {
		return "", err
	}
	version = installedVersion(ctx, packages[0]) // nothing was downloaded if it is installed already
	for _, file := range files {
		if name, rest, _ := strings.Cut(filepath.Base(file), "_"); name == packages[0] {
			version, _, _ = strings.Cut(rest, "_")
		}
	}
	return version, os.WriteFile(stamp, []byte(strings.Join(packages, " ")+"\n"+version+"\n"), 0o644)
}

func debFiles(dir string) ([]string, error) { return filepath.Glob(filepath.Join(dir, "*.deb")) }

func installedVersion(ctx context.Context, name string) string {
	out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", name).Output()
	if err != nil {
		return "unknown version"
	}
	return string(out)
}

// installModules runs npm in the same kind of root that the relay will run in, so that it can use a Node.js that was only
// unpacked.
func installModules(ctx context.Context, dir string, f fetched, packages []npmPackage) (version string, err error) {
	if err := os.MkdirAll(f.Modules, 0o755); err != nil {
		return "", err
	}
	major, err := nodeMajor(ctx, dir, f)
	if err != nil {
		return "", err
	}
	var want []string
	for _, p := range packages {
		v := p.version
		if major < p.newestNeedNode {
			v = p.versionNode18
		}
		want = append(want, p.name+"@"+v)
		if version == "" {
			version = v
		}
	}
	stamp := filepath.Join(f.Modules, ".complete")
	if b, err := os.ReadFile(stamp); err == nil && string(b) == strings.Join(want, " ") {
		return version, nil
	}
	if err := errors.Join(os.RemoveAll(f.Modules), os.MkdirAll(f.Modules, 0o755)); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(f.Modules, "package.json"), []byte(`{"private":true}`), 0o644); err != nil {
		return "", err
	}
	args := append([]string{"npm", "install", "--omit=optional", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund",
		"--no-update-notifier", "--prefix", modulesInRoot}, want...)
	if out, err := inRoot(ctx, dir, f, args); err != nil {
		return "", fmt.Errorf("npm install %s: %w\n%s", strings.Join(want, " "), err, out)
	}
	return version, os.WriteFile(stamp, []byte(strings.Join(want, " ")), 0o644)
}

func nodeMajor(ctx context.Context, dir string, f fetched) (int, error) {
	out, err := inRoot(ctx, dir, f, []string{"node", "--version"})
	if err != nil {
		return 0, fmt.Errorf("node --version: %w\n%s", err, out)
	}
	major, _, _ := strings.Cut(strings.TrimPrefix(string(bytes.TrimSpace(out)), "v"), ".")
	return strconv.Atoi(major)
}

//go:embed gosmtp/main.go
var goSMTPServer []byte

// buildGoSMTP builds the server with a version of go-smtp, in a separate module in dir. It is linked statically, because it runs
// in the relay's root.
func buildGoSMTP(ctx context.Context, dir, version string) (program string, err error) {
	program = filepath.Join(dir, "server")
	source := filepath.Join(dir, "main.go")
	if b, err := os.ReadFile(source); err == nil && bytes.Equal(b, goSMTPServer) {
		if _, err := os.Stat(program); err == nil {
			return program, nil
		}
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755), os.WriteFile(source, goSMTPServer, 0o644)); err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"mod", "init", "relay.example/server"},
		{"mod", "edit", "-require=github.com/emersion/go-smtp@v" + version},
		{"mod", "tidy"},
		{"build", "-o", program, "."},
	} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
		}
	}
	return program, nil
}

// inRoot runs a command once in a new root for f, with the machine's network, and returns its output.
func inRoot(ctx context.Context, dir string, f fetched, args []string) ([]byte, error) {
	in, err := json.Marshal(enterOrder{Dir: dir, Relay: f, Args: args})
	if err != nil {
		return nil, err
	}
	cmd := reexec(ctx, stageEnter, withNetwork)
	cmd.Stdin = bytes.NewReader(in)
	return cmd.CombinedOutput()
}

// command runs a tool of the machine, and adds its output to the error if it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(slices.Clone(os.Environ()), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
