// What check prints for each wrong setting: the whole text, in testdata/check, to be read as by somebody who has not seen it
// before. "go test -run Golden -update" writes it anew.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

var update = flag.Bool("update", false, "write the golden files")

// command runs the program with those arguments and without a terminal.
func command(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// without is a URL with some of its parts replaced.
func with(t *testing.T, raw string, change func(*url.URL, url.Values)) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	change(u, q)
	u.RawQuery = q.Encode()
	return u.String()
}

// unusedPort is a port of loopback on which nothing listens.
func unusedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// knowsNobody is a resolver that answers each question with NXDOMAIN (RFC 1035, 4.1.1).
func knowsNobody() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() { // until the resolver closes its end
			defer server.Close()
			for {
				length := make([]byte, 2)
				if _, err := io.ReadFull(server, length); err != nil {
					return
				}
				message := make([]byte, binary.BigEndian.Uint16(length))
				if _, err := io.ReadFull(server, message); err != nil {
					return
				}
				message[2], message[3] = 0x81, 0x83
				message[11] = 0 // no additional records: they are cut off
				for i := 12; ; i += int(message[i]) + 1 {
					if message[i] == 0 {
						message = message[:i+5]
						break
					}
				}
				_, _ = server.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
			}
		}()
		return client, nil
	}}
}

func TestCheckGolden(t *testing.T) {
	type setup struct {
		relay    func(*smtptest.Server)
		implicit bool
		fault    *smtptest.Fault
		url      func(*url.URL, url.Values)
		args     []string
		exit     int
	}
	for name, c := range map[string]setup{
		"right":         {},
		"right-smtps":   {implicit: true},
		"right-no-auth": {relay: func(s *smtptest.Server) { s.NoAuth, s.NoTLS = true, true }},
		"right-chunking": {relay: func(s *smtptest.Server) {
			s.Chunking = true
			s.Extensions = []string{"SMTPUTF8", "DSN", "LIMITS RCPTMAX=50"}
		}},
		"unsound-chunking":    {relay: func(s *smtptest.Server) { s.Chunking, s.KeepRefusedChunks = true, true }},
		"recipient-taken":     {args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}},
		"test-mail":           {args: []string{"--from", "shop@example.com", "--to", "ann@example.org", "--send"}},
		"wrong-password":      {url: func(u *url.URL, _ url.Values) { u.User = url.UserPassword("apikey", "wrong") }, exit: exitAuth},
		"wrong-port":          {url: func(u *url.URL, _ url.Values) { u.Host = "127.0.0.1:" + unusedPort(t) }, exit: exitReach},
		"tls-on-a-plain-port": {url: func(u *url.URL, _ url.Values) { u.Scheme = "smtps" }, exit: exitTLS},
		"plain-on-a-tls-port": {implicit: true, url: func(u *url.URL, q url.Values) {
			u.Scheme = "smtp"
			q.Set("greeting_timeout", "300ms") // it is silent for ever
		}, exit: exitTLS},
		"no-starttls": {relay: func(s *smtptest.Server) { s.NoTLS = true }, url: func(u *url.URL, q url.Values) {
			u.Scheme = "smtp"
			q.Set("tls", "starttls")
		}, exit: exitTLS},
		"self-signed":                  {url: func(_ *url.URL, q url.Values) { q.Del("ca") }, exit: exitTLS},
		"expired":                      {relay: func(s *smtptest.Server) { s.CertNotAfter = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC) }, exit: exitTLS},
		"certificate-for-another-name": {relay: func(s *smtptest.Server) { s.CertNames = []string{"mail.example.com"} }, exit: exitTLS},
		"unknown-host":                 {url: func(u *url.URL, _ url.Values) { u.Host = "smtp.exmaple.com:587" }, exit: exitReach},
		"not-a-relay":                  {fault: &smtptest.Fault{At: smtptest.Connect, Reply: "HTTP/1.1 400 Bad Request", Drop: true, Count: -1}, exit: exitReach},
		"greeting-refused":             {fault: &smtptest.Fault{At: smtptest.Connect, Reply: "554 5.7.1 no mail from 192.0.2.9", Drop: true, Count: -1}, exit: exitReach},
		"auth-not-offered": {relay: func(s *smtptest.Server) { s.NoAuth = true },
			url: func(u *url.URL, _ url.Values) { u.User = url.UserPassword("me", "secret") }, exit: exitAuth},
		"recipient-refused": {relay: func(s *smtptest.Server) { s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"} },
			args: []string{"--from", "shop@example.com", "--to", "gone@example.org"}, exit: exitRefused},
		"relaying-denied": {fault: &smtptest.Fault{At: smtptest.Rcpt, Reply: "554 5.7.1 <ann@example.org>: Relay access denied"},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitRefused},
		"relaying-denied-without-login": {relay: func(s *smtptest.Server) { s.NoAuth = true }, fault: &smtptest.Fault{At: smtptest.Rcpt, Reply: "554 5.7.1 <ann@example.org>: Relay access denied"},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitRefused},
		"login-wanted": {url: func(u *url.URL, _ url.Values) { u.User = nil }, fault: &smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 Sender address rejected"},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitRefused},
		"greylisted": {fault: &smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 greylisted, try again"},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitRefused},
		"sender-refused": {fault: &smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 the from address does not match a verified Sender Identity"},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitRefused},
		"login-behind-starttls": {url: func(u *url.URL, q url.Values) { u.Scheme = "smtp+insecure"; q.Del("ca") }, exit: exitAuth},
		"no-greeting":           {fault: &smtptest.Fault{At: smtptest.Connect, Drop: true, Count: -1}, exit: exitReach},
		"no-reply-to-ehlo":      {fault: &smtptest.Fault{At: smtptest.EHLO, Drop: true, Count: -1}, exit: exitReach},
		"no-reply-to-mail": {fault: &smtptest.Fault{At: smtptest.Mail, Drop: true, Count: -1},
			args: []string{"--from", "shop@example.com", "--to", "ann@example.org"}, exit: exitReach},
		"wrong-url":            {url: func(u *url.URL, q url.Values) { u.Scheme = "http"; q.Set("max_conn", "3") }, exit: exitUsage},
		"one-address-does-not": {relay: func(s *smtptest.Server) { s.Addresses = 2 }, fault: &smtptest.Fault{At: smtptest.Connect, Addr: 2, Reply: "421 4.3.2 draining", Drop: true, Count: -1}},
	} {
		t.Run(name, func(t *testing.T) {
			relay := smtptest.NewUnstartedServer()
			if c.relay != nil {
				c.relay(relay)
			}
			if c.implicit {
				relay.StartTLS()
			} else {
				relay.Start()
			}
			defer relay.Close()
			if c.fault != nil {
				relay.Fault(*c.fault)
			}
			old := net.DefaultResolver
			defer func() { net.DefaultResolver = old }()
			net.DefaultResolver = relay.Resolver()
			if name == "unknown-host" {
				net.DefaultResolver = knowsNobody()
			}
			change := c.url
			if change == nil {
				change = func(*url.URL, url.Values) {}
			}
			if relay.Addresses > 1 {
				change = func(u *url.URL, q url.Values) { u.Host = "relay.test:" + u.Port(); q.Set("server_name", "localhost") }
			}
			t.Setenv("SMTP_URL", with(t, relay.URL(), change))
			code, out, errs := command(t, "", append([]string{"smtprelay", "check"}, c.args...)...)
			if code != c.exit {
				t.Errorf("exit status %d, want %d", code, c.exit)
			}
			got := settled(out + errs)
			if strings.Contains(got, relay.Password) {
				t.Error("the password is in the output")
			}
			file := filepath.Join("testdata", "check", name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs:\n%s", file, got)
			}
			if len(relay.Messages()) != 0 && name != "test-mail" {
				t.Error("a message was sent")
			}
			if n := relay.Stats().Auths; name == "wrong-password" && n != 1 {
				t.Errorf("the wrong password was tried %d times", n)
			}
		})
	}
}

// settled is text without what differs from run to run.
func settled(text string) string {
	for _, r := range []struct{ from, to string }{
		{`(127\.0\.0\.\d|relay\.test):\d+`, "$1:PORT"},
		{`(?i)(port) \d+`, "$1 PORT"},
		{`\(?\b[0-9.e-]+ ms\)?`, "TIME"},
		{`it says .*`, "it says NOW."},
		{`at this time: .*`, "at this time: NOW."},
		{`([0-9A-F]{2} ){31}[0-9A-F]{2}`, "FINGERPRINT"},
		{`lookup (\S+) on \S+:`, "lookup $1:"},
		{`session [0-9a-zA-Z]+`, "session ID"},
	} {
		text = regexp.MustCompile(r.from).ReplaceAllString(text, r.to)
	}
	return text
}

func TestCheckTellsProgramsTheSameByJSON(t *testing.T) {
	relay := smtptest.New(t)
	t.Setenv("SMTP_URL", with(t, relay.URL(), func(u *url.URL, _ url.Values) { u.User = url.UserPassword("apikey", "wrong") }))
	code, out, _ := command(t, "", "smtprelay", "check", "--json")
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if code != exitAuth || r.Exit != code || r.Problem == nil || r.Problem.Step != "auth" || r.Problem.Change == "" || len(r.Addresses) != 1 || len(r.Addresses[0].Steps) < 6 {
		t.Errorf("exit %d, report %s", code, out)
	}
}

func TestCheckTellsProgramsOfWrongSettingsByJSON(t *testing.T) {
	t.Setenv("SMTP_URL", "relay.example:587")
	code, out, _ := command(t, "", "smtprelay", "check", "--json")
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if code != exitUsage || r.Exit != code || r.Problem == nil || r.Problem.Step != "settings" {
		t.Errorf("exit %d, report %s", code, out)
	}
}

func TestCheckTakesAddressesWithNames(t *testing.T) {
	relay := smtptest.New(t)
	t.Setenv("SMTP_URL", relay.URL())
	if code, out, errs := command(t, "", "smtprelay", "check", "--from", "Shop <shop@example.com>", "--to", "ann@example.org"); code != 0 {
		t.Errorf("exit status %d\n%s%s", code, out, errs)
	}
	for _, to := range []string{"ann", "ann@example.org, bob@example.org"} {
		if code, _, errs := command(t, "", "smtprelay", "check", "--from", "shop@example.com", "--to", to); code != exitUsage || !strings.Contains(errs, "--to: ") {
			t.Errorf("%q: exit status %d, %s", to, code, errs)
		}
	}
}

func TestCheckWarnsOfACertificateThatExpiresSoon(t *testing.T) {
	for left, want := range map[time.Duration]string{
		13 * 24 * time.Hour: "expires in 12 days",
		time.Hour:           "expires on ",
		20 * 24 * time.Hour: "",
	} {
		relay := smtptest.New(t, func(s *smtptest.Server) { s.CertNotAfter = time.Now().Add(left) })
		t.Setenv("SMTP_URL", relay.URL())
		code, out, _ := command(t, "", "smtprelay", "check")
		if code != 0 || strings.Contains(out, "certificate expires") != (want != "") || !strings.Contains(out, want) {
			t.Errorf("%v: exit status %d\n%s", left, code, out)
		}
	}
}
