// Mutants proves that the tests can fail. It breaks the client on purpose, one line at a time, in a copy of the module, and runs
// the dialogues and the storm against each broken client; if they pass, it runs all tests of the root module.
//
//	go run ./tools/mutants            # all of them; exits with 1 if one survives or does not apply
//	go run ./tools/mutants -only=RSET # those whose name contains RSET
//	go run ./tools/mutants -check     # report those that do not apply, and run none
//	go run ./tools/mutants -list
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// mutant is one deliberate fault.
type mutant struct {
	name     string // what the client does wrong
	file     string // below the root of the module
	old, new string // old must occur exactly once
}

var (
	only  = flag.String("only", "", "run the mutants whose name contains `text`")
	list  = flag.Bool("list", false, "list the mutants and run none")
	check = flag.Bool("check", false, "report the mutants that do not apply and run none")
	seeds = flag.Int("seeds", 3000, "how many seeds of the storm to run against each")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run() error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	if *check {
		return checkAll(root)
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := copyModule(dir, root); err != nil {
		return err
	}
	caught, missed := 0, 0
	for _, m := range append([]mutant{{name: "none: the client unchanged"}}, mutants...) {
		if *list || !strings.Contains(m.name, *only) && m.file != "" {
			if *list && m.file != "" {
				fmt.Printf("%s: %s\n", m.file, m.name)
			}
			continue
		}
		began := time.Now()
		verdict, ok := try(dir, m)
		fmt.Printf("%-60s %s (%.0fs)\n", m.name, verdict, time.Since(began).Seconds())
		switch {
		case m.file == "" && !ok:
			return errors.New("the tests fail without a mutant")
		case m.file == "":
		case ok:
			caught++
		default:
			missed++
		}
	}
	if *list {
		return nil
	}
	fmt.Printf("%d caught, %d not\n", caught, missed)
	if missed > 0 {
		return errors.New("a mutant has survived or does not apply")
	}
	return nil
}

// checkAll reports each mutant that does not apply to the source below root.
func checkAll(root string) error {
	var errs []error
	for _, m := range mutants {
		if _, err := m.source(root); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
		}
	}
	fmt.Printf("%d mutants, %d do not apply\n", len(mutants), len(errs))
	return errors.Join(errs...)
}

// source returns the file that m changes, or an error unless old occurs in it exactly once.
func (m mutant) source(root string) ([]byte, error) {
	src, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(m.file)))
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(src, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("%q occurs %d times in %s, want once", m.old, n, m.file)
	}
	return src, nil
}

// try makes one mutant, tests it and reverts it. It reports whether a test caught the mutant or, for no mutant, whether all
// passed.
func try(dir string, m mutant) (verdict string, ok bool) {
	if m.file != "" {
		path := filepath.Join(dir, filepath.FromSlash(m.file))
		src, err := m.source(dir)
		if err != nil {
			return "DOES NOT APPLY: " + err.Error(), false
		}
		defer os.WriteFile(path, src, 0o666)
		if err := os.WriteFile(path, bytes.Replace(src, []byte(m.old), []byte(m.new), 1), 0o666); err != nil {
			return err.Error(), false
		}
		if out, err := command(dir, "build", "./..."); err != nil {
			return "DOES NOT BUILD: " + out, false
		}
	}
	if m.file != "" { // the dialogues take a second and catch most
		if out, err := command(dir, "test", "-run", "TestDialogue$", "./internal/test/dialogue"); err != nil {
			return "caught by a dialogue: " + firstFault(out), true
		}
	}
	out, err := command(dir, "test", "-run", "TestStorm", "-timeout", "5m", "./internal/test/storm", fmt.Sprintf("-storm.seeds=%d", *seeds))
	switch {
	case m.file == "":
		if err != nil {
			return "FAILS\n" + out, false
		}
		return "passes", true
	case err != nil:
		return "caught by the storm: " + firstFault(out), true
	}
	// The tests of behaviour catch most of the rest; to link those of every package takes longer than to run these.
	for _, packages := range [][]string{{".", "./test"}, {"./..."}} {
		if out, err := command(dir, append([]string{"test", "-failfast", "-timeout", "5m"}, packages...)...); err != nil {
			return "caught by the tests: " + firstFault(out), true
		}
	}
	return "SURVIVED", false
}

func command(dir string, args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// fault matches the beginning of a failure in the output of go test.
var fault = regexp.MustCompile(`(?m)^\s+\w+_test\.go:\d+: (.*)$|^(panic: .*)$|^(fatal error: .*)$`)

// firstFault returns the first line of the output that describes a failure.
func firstFault(out string) string {
	for _, m := range fault.FindAllStringSubmatch(out, -1) {
		for _, text := range m[1:] {
			if text != "" && !strings.HasPrefix(text, "seeds ") {
				return text[:min(len(text), 160)]
			}
		}
	}
	return "exit status 1"
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/smtprelay/smtprelay").Output()
	return string(bytes.TrimSpace(out)), err
}

// copyModule copies the root module, without the modules below it.
func copyModule(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if rel != "." && (err == nil || strings.HasPrefix(d.Name(), ".")) {
				return fs.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, rel), 0o777)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o666)
	})
}
