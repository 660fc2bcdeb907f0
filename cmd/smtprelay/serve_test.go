// The command serve: what it refuses before anything listens, what it prints, and how it ends. The relay itself is tested in
// internal/devrelay.
package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
)

func TestServeRefusesWrongFlagsBeforeAnythingListens(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	short := filepath.Join(t.TempDir(), "short")
	for file, text := range map[string]string{empty: "\n", short: "secret\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--listen", "2525"}, `--listen "2525": want HOST:PORT`},
		{[]string{"--http", "nowhere"}, `--http "nowhere": want HOST:PORT`},
		{[]string{"--tls", "yes"}, `--tls "yes": want none, starttls or implicit`},
		{[]string{"--cert-file", "x.pem"}, "--cert-file needs --tls"},
		{[]string{"--password-file", short}, "--password-file needs --user"},
		{[]string{"--user", "me", "--password-file", empty}, "the file is empty"},
		{[]string{"--user", "me", "--password-file", empty + "x"}, "no such file"},
		{[]string{"--token-file", short}, "the token is too short"},
		{[]string{"--max-conns", "0"}, "--max-conns 0: want 1"},
		{[]string{"--max-messages", "-1"}, "--max-messages -1: want 1"},
		{[]string{"--max-recipients", "0"}, "--max-recipients 0: want 1"},
		{[]string{"--max-size", "0"}, "--max-size 0: want 1"},
		{[]string{"--rate", "-1"}, "--rate -1: want 0"},
		{[]string{"--delay", "-1s"}, "--delay -1s: want 0"},
		{[]string{"--keep", "0"}, "--keep 0: want 1"},
		{[]string{"--keep-bytes", "0"}, "--keep-bytes 0: want 1"},
		{[]string{"--fault", "rctp=450 later"}, `"rctp" is no step`},
		{[]string{"--fault", "rcpt"}, "want STEP=REPLY"},
		{[]string{"--keep", "many"}, "invalid argument"},
		{[]string{"--no-such-flag"}, "unknown flag"},
		{[]string{"more"}, "serve takes flags only"},
		{[]string{"--keep", "0", "--tls", "yes"}, "; "}, // both mistakes
	} {
		code, out, errs := command(t, "", append([]string{"smtprelay", "serve"}, c.args...)...)
		if code != exitUsage || out != "" || !strings.Contains(errs, c.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: exit status %d, printed %q and %q, want %s", c.args, code, out, errs, c.want)
		}
	}
}

func TestServeTellsWhereItCannotListen(t *testing.T) {
	code, _, errs := command(t, "", "smtprelay", "serve", "--listen", "127.0.0.1:0", "--http", "203.0.113.1:80")
	if code != exitListen || !strings.Contains(errs, "203.0.113.1:80") {
		t.Errorf("exit status %d, %q", code, errs)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	code, _, errs = command(t, "", "smtprelay", "serve", "--listen", l.Addr().String())
	if code != exitListen || !strings.Contains(errs, l.Addr().String()+" is in use by another program: choose another port with --listen") {
		t.Errorf("exit status %d, %q", code, errs)
	}
	code, _, errs = command(t, "", "smtprelay", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--tls", "starttls", "--cert-file", filepath.Join(t.TempDir(), "no", "such", "folder"))
	if code != exitListen || !strings.Contains(errs, "folder") {
		t.Errorf("exit status %d, %q", code, errs)
	}
}

// serve starts the program and returns what it has printed. stop ends it as a signal does and returns its exit status.
func serve(t *testing.T, args ...string) (smtpURL, page string, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out, stdout := io.Pipe()
	var stderr bytes.Buffer
	code := make(chan int, 1)
	go func() { // until the context ends
		code <- run(ctx, append([]string{"smtprelay", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"}, args...), strings.NewReader(""), stdout, &stderr)
		stdout.Close()
	}()
	t.Cleanup(cancel)
	lines := bufio.NewScanner(out)
	for page == "" && lines.Scan() {
		if u, ok := strings.CutPrefix(lines.Text(), "SMTP_URL='"); ok {
			smtpURL = strings.TrimSuffix(u, "'")
		}
		page, _ = strings.CutPrefix(lines.Text(), "Page: ")
		if !strings.HasPrefix(lines.Text(), "Page: ") {
			page = ""
		}
	}
	if smtpURL == "" || page == "" {
		t.Fatalf("the program has not said where it is; exit status %d, %s", <-code, &stderr)
	}
	go io.Copy(io.Discard, out) // until the program ends
	return smtpURL, page, func() int { cancel(); return <-code }
}

func TestServeTakesMailByTheURLThatItPrints(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("it's & secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cert := filepath.Join(t.TempDir(), "cert.pem")
	for _, args := range [][]string{
		nil,
		{"--tls", "starttls", "--user", "me"},
		{"--tls", "implicit", "--user", "me", "--password-file", password, "--cert-file", cert, "--name", "relay"},
	} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			smtpURL, page, stop := serve(t, append(args, "--fault", "dot=451 4.7.1 later; nth=2; count=1")...)
			cfg, err := smtprelay.ParseURL(smtpURL)
			if err != nil {
				t.Fatal(err)
			}
			client, err := smtprelay.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			send := func() error {
				_, err := client.Send(t.Context(), smtprelay.Message{From: "a@example.com", To: []string{"b@example.org"}, Body: smtprelay.Bytes([]byte("Subject: hi\r\n\r\n"))})
				return err
			}
			if err := send(); err != nil {
				t.Error(err)
			}
			if err := send(); err == nil || !strings.Contains(err.Error(), "451 4.7.1") {
				t.Errorf("the fault has not struck: %v", err)
			}
			res, err := http.Get(page + "api/v1/messages")
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if !strings.Contains(string(text), `"subject":"hi"`) {
				t.Errorf("%s", text)
			}
			certFile := ""
			if m := regexp.MustCompile(`ca=([^&]+)`).FindStringSubmatch(smtpURL); m != nil {
				certFile = strings.ReplaceAll(m[1], "%2F", "/")
			}
			if code := stop(); code != 0 {
				t.Errorf("exit status %d", code)
			}
			if _, err := os.Stat(certFile); certFile != "" && (err == nil) != (certFile == cert) {
				t.Errorf("the certificate's file %s after the end: %v", certFile, err)
			}
			if res, err := http.Get(page); err == nil {
				res.Body.Close()
				t.Error("the page is there after the end")
			}
		})
	}
}

func TestServeAPIIsDescribed(t *testing.T) {
	doc, err := os.ReadFile("SERVE.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("internal/devrelay/api.go")
	if err != nil {
		t.Fatal(err)
	}
	routes := regexp.MustCompile(`api\("([A-Z]+)", "([^"]+)"`).FindAllStringSubmatch(string(source), -1)
	if len(routes) < 20 {
		t.Fatalf("%d routes", len(routes))
	}
	for _, r := range routes {
		if !strings.Contains(string(doc), "`"+r[1]+" "+r[2]) {
			t.Errorf("SERVE.md does not have %s %s", r[1], r[2])
		}
	}
}
