// Tests what the pages say about other libraries and the compiler cannot check: what a relay gets from them.
package docs

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/emersion/go-msgauth/dkim"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Runs the README's first program in an empty module, as a newcomer has it. go.mod is made with the README's commands, with this
// tree for smtprelay and this module's version of go-mail.
func TestFirstProgramSendsFromAnEmptyModule(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile("(?ms)^```go\n(package main\n.*?)^```$").FindSubmatch(text)
	if program == nil {
		t.Fatal("the README has no program")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program[1], 0o600); err != nil {
		t.Fatal(err)
	}
	relay := smtptest.New(t)
	run := func(command ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod", "SMTP_URL="+relay.URL())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
		return string(out)
	}
	version := strings.Fields(versionOf(t, "github.com/wneessen/go-mail"))[1]
	named := regexp.MustCompile(`go get .*go-mail@(v[\d.]+)`).FindAllSubmatch(text, -1)
	for _, n := range named {
		if string(n[1]) != version {
			t.Errorf("the README names go-mail@%s, and is tested with %s", n[1], version)
		}
	}
	if len(named) == 0 {
		t.Error("the README's go get names no version of go-mail")
	}
	run("go", "mod", "init", "example.com/hello")
	run("go", "mod", "edit", "-require=github.com/smtprelay/smtprelay@v0.0.0", "-replace=github.com/smtprelay/smtprelay="+root,
		"-require=github.com/wneessen/go-mail@"+version)
	run("go", "mod", "tidy")
	run("go", "vet", ".")
	out := run("go", "run", ".")

	arrived := readback.Only(t, relay)
	if !strings.Contains(out, arrived.ID) {
		t.Errorf("the program does not print the queue ID %s: %s", arrived.ID, out)
	}
	got := readback.Message(t, arrived, "shop@example.com", "ann@example.org", "archive@example.com")
	for _, field := range []string{"From", "To", "Subject", "Date", "Message-Id", "List-Unsubscribe", "List-Unsubscribe-Post"} {
		if got.Header.Get(field) == "" {
			t.Errorf("no %s", field)
		}
	}
	if got.Header.Get("Bcc") != "" || strings.Contains(string(arrived.Body), "archive@example.com") {
		t.Error("the Bcc recipient is visible")
	}
	if got.Text == "" || !strings.Contains(got.HTML, "<p>") || string(got.Files["invoice.csv"]) != "item,price\nteapot,12.50\n" {
		t.Errorf("got %+v", got)
	}
}

// versionOf returns the path and version of a dependency from this module's go.mod.
func versionOf(t *testing.T, path string) string {
	t.Helper()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^\s*` + regexp.QuoteMeta(path) + ` .*$`).FindString(string(mod))
	if line == "" {
		t.Fatalf("go.mod has no %s", path)
	}
	return line
}

// A signature covers the octets, so line ends and dots must arrive as they were signed.
func TestDKIMSignatureIsValidAfterTheRelay(t *testing.T) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	rfc5322 := []byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: Your order\r\n\r\n.A dot, and trailing blanks  \r\n.\r\n\r\n\r\n")
	var signed bytes.Buffer
	if err := dkim.Sign(&signed, bytes.NewReader(rfc5322), &dkim.SignOptions{Domain: "example.com", Selector: "mail", Signer: crypto.Signer(key)}); err != nil {
		t.Fatal(err)
	}
	for _, chunking := range []bool{false, true} {
		relay := smtptest.New(t, func(s *smtptest.Server) { s.Chunking = chunking })
		client := relay.Client(t, func(c *smtprelay.Config) { c.Chunking = chunking })
		if err := client.SendMail("shop@example.com", []string{"ann@example.org"}, signed.Bytes()); err != nil {
			t.Fatal(err)
		}
		arrived := readback.Only(t, relay)
		if arrived.Chunked != chunking {
			t.Errorf("chunked: %v, want %v", arrived.Chunked, chunking)
		}
		record := "v=DKIM1; k=ed25519; p=" + base64.StdEncoding.EncodeToString(public)
		got, err := dkim.VerifyWithOptions(bytes.NewReader(arrived.Body), &dkim.VerifyOptions{
			LookupTXT: func(string) ([]string, error) { return []string{record}, nil },
		})
		if err != nil || len(got) != 1 || got[0].Err != nil {
			t.Errorf("chunked %v: got %+v, %v", chunking, got, err)
		}
	}
}
