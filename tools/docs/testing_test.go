// Tests what docs/testing.md says about smtptest and the compiler cannot check: its tests pass, and its faults end as its table
// says.
package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// steps are the steps that the table of faults names.
var steps = map[string]smtptest.Step{"Rcpt": smtptest.Rcpt, "FinalDot": smtptest.FinalDot, "Auth": smtptest.Auth, "Data": smtptest.Data, "Accepted": smtptest.Accepted}

// faultOf reads a composite literal such as {At: smtptest.Rcpt, Reply: "550 no"}.
func faultOf(t *testing.T, literal string) (f smtptest.Fault) {
	t.Helper()
	expr, err := parser.ParseExpr("F" + literal)
	if err != nil {
		t.Fatalf("%s: %v", literal, err)
	}
	for _, field := range expr.(*ast.CompositeLit).Elts {
		pair := field.(*ast.KeyValueExpr)
		switch key := pair.Key.(*ast.Ident).Name; key {
		case "At":
			if f.At = steps[pair.Value.(*ast.SelectorExpr).Sel.Name]; f.At == 0 {
				t.Fatalf("%s: unknown step", literal)
			}
		case "Reply":
			if f.Reply, err = strconv.Unquote(pair.Value.(*ast.BasicLit).Value); err != nil {
				t.Fatal(err)
			}
		case "Drop":
			f.Drop = true
		case "Count":
			f.Count = -1
		default:
			t.Fatalf("%s: unknown field", literal)
		}
	}
	return f
}

func TestFaultsEndAsTestingPageSays(t *testing.T) {
	page, err := os.ReadFile("../../docs/testing.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| ([^|]+) \\| `(\\{At: [^`]+\\})` \\| `(\\w+)`(.*) \\| (true|false|) \\|$").FindAllStringSubmatch(string(page), -1)
	if len(rows) < 6 {
		t.Fatalf("the table has %d rows", len(rows))
	}
	outcomes := map[string]smtprelay.Outcome{"Accepted": smtprelay.Accepted, "NotAccepted": smtprelay.NotAccepted, "Unknown": smtprelay.Unknown}
	for _, row := range rows {
		t.Run(row[1], func(t *testing.T) {
			relay := smtptest.New(t)
			fault := relay.Fault(faultOf(t, row[2]))
			client := relay.Client(t, func(c *smtprelay.Config) { c.Retry.MinBackoff = 1 })
			_, err := client.Send(t.Context(), smtprelay.Message{From: "shop@example.com", To: []string{"ann@example.org"}, Body: smtprelay.Bytes([]byte("Subject: hi\r\n\r\nhi\r\n"))})
			if got := smtprelay.OutcomeOf(err); got != outcomes[row[3]] {
				t.Errorf("got %v (%v), want %s", got, err, row[3])
			}
			if got := fmt.Sprint(smtprelay.ShouldRetry(err)); row[5] != "" && got != row[5] {
				t.Errorf("ShouldRetry is %s (%v), want %s", got, err, row[5])
			}
			want := map[bool]int{true: 1}[err == nil || strings.Contains(row[4], "the relay has it")]
			if n := len(relay.Messages()); n != want {
				t.Errorf("the relay has %d messages, want %d", n, want)
			}
			if fault.Hits() == 0 {
				t.Error("the fault did not strike")
			}
		})
	}
}

// Runs the tests that pages show, in a separate module.
func TestTestsInPagesPass(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir, found := t.TempDir(), 0
	for page, text := range read(t).pages {
		if !strings.HasPrefix(page, "docs/") {
			continue
		}
		for _, b := range blocks(page, text) {
			if !strings.HasPrefix(b.code, "func Test") {
				continue
			}
			found++
			source := "package page\n\n"
			for _, p := range append(b.imports, imported...) {
				if strings.Contains(b.code, p[strings.LastIndexByte(p, '/')+1:]+".") && !strings.Contains(source, strconv.Quote(p)) {
					source += "import " + strconv.Quote(p) + "\n"
				}
			}
			folder := filepath.Join(dir, fmt.Sprintf("page%d", found))
			if err := os.Mkdir(folder, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(folder, "page_test.go"), []byte(source+"\n"+b.code), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if found == 0 {
		t.Fatal("no page has a test")
	}
	for _, command := range [][]string{
		{"go", "mod", "init", "example.com/page"},
		{"go", "mod", "edit", "-require=github.com/smtprelay/smtprelay@v0.0.0", "-replace=github.com/smtprelay/smtprelay=" + root},
		{"go", "mod", "tidy"},
		{"go", "test", "-count=1", "./..."},
	} {
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
	}
}
