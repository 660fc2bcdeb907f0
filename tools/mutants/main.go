// Mutants proves that the tests can fail. It breaks the client on purpose, one line at a time, in a copy of the module,
// and runs the storm against each broken client; what the storm lets pass is given to all tests of the root module.
//
//	go run ./internal/mutants            # all of them; exits with 1 if one survives or can no longer be made
//	go run ./internal/mutants -only=RSET # those whose name contains this
//	go run ./internal/mutants -list
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
	old, new string // old must be there exactly once
}

var (
	only  = flag.String("only", "", "run the mutants whose name contains `text`")
	list  = flag.Bool("list", false, "list the mutants and run none")
	seeds = flag.Int("seeds", 3000, "how many seeds of the storm each has to survive")
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
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := copyModule(dir, root); err != nil {
		return err
	}
	caught, missed := 0, 0
	for _, m := range append([]mutant{{name: "none: the client as it is"}}, mutants...) {
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
		return errors.New("a mutant has survived, or can no longer be made")
	}
	return nil
}

// try makes one mutant, tests it and unmakes it. It reports whether that went as it should.
func try(dir string, m mutant) (verdict string, ok bool) {
	if m.file != "" {
		path := filepath.Join(dir, filepath.FromSlash(m.file))
		src, err := os.ReadFile(path)
		if err != nil {
			return err.Error(), false
		}
		if n := strings.Count(string(src), m.old); n != 1 {
			return fmt.Sprintf("DOES NOT APPLY: %q is %d times in %s", m.old, n, m.file), false
		}
		defer os.WriteFile(path, src, 0o666)
		if err := os.WriteFile(path, []byte(strings.Replace(string(src), m.old, m.new, 1)), 0o666); err != nil {
			return err.Error(), false
		}
		if out, err := command(dir, "build", "./..."); err != nil {
			return "DOES NOT BUILD: " + out, false
		}
	}
	if m.file != "" { // the dialogues take a second and catch most
		if out, err := command(dir, "test", "-run", "TestDialogue$", "."); err != nil {
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
	if out, err := command(dir, "test", "-timeout", "5m", "./..."); err != nil {
		return "caught by the tests: " + firstFault(out), true
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

// fault is how a failure begins in the output of go test.
var fault = regexp.MustCompile(`(?m)^\s+\w+_test\.go:\d+: (.*)$|^(panic: .*)$|^(fatal error: .*)$`)

// firstFault returns the first line of the output that tells what is wrong.
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

// copyModule copies the root module. Modules below it stay behind, and so does this program, whose own test would notice every
// mutant.
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
			if rel != "." && (err == nil || strings.HasPrefix(d.Name(), ".")) || rel == filepath.Join("internal", "mutants") {
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
