package main

import (
	"bytes"
	netmail "net/mail"
	"net/url"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

// A receipt, or one line that says what to change.
func TestSendOneThroughTheRelayOfAURL(t *testing.T) {
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS = true // sendOne trusts only the system's roots, not a test relay's
	relay.Start()
	defer relay.Close()
	good, err := url.Parse(relay.URL())
	if err != nil {
		t.Fatal(err)
	}
	withPassword := func(u url.URL, password string) string {
		u.User = url.UserPassword(u.User.Username(), password)
		return u.String()
	}
	otherScheme := func(u url.URL, scheme string) string {
		u.Scheme = scheme
		return u.String()
	}
	otherHost := func(u url.URL, host string) string {
		u.Host = host
		return u.String()
	}

	for _, test := range []struct {
		name, url, from, to string
		says                []string
		accepted            int
	}{
		{"all is well", good.String(), "shop@example.com", "ann@example.org", []string{"Accepted in", "250", "ann@example.org"}, 1},
		{"no recipient", good.String(), "shop@example.com", "", []string{"-to"}, 0},
		{"wrong key", withPassword(*good, "wrong"), "shop@example.com", "ann@example.org", []string{"535", "SMTP_URL"}, 0},
		{"wrong port", otherHost(*good, "127.0.0.1:1"), "shop@example.com", "ann@example.org", []string{"127.0.0.1:1", "port"}, 0},
		{"TLS on a plain port", otherScheme(*good, "smtps"), "shop@example.com", "ann@example.org", []string{"smtp://"}, 0},
		{"unknown setting", good.String() + "?max_cons=4", "shop@example.com", "ann@example.org", []string{"max_cons"}, 0},
		{"no URL", "smtp.sendgrid.net", "shop@example.com", "ann@example.org", []string{"smtps://"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := relay.Stats().Accepted
			var out bytes.Buffer
			err := sendOne(t.Context(), &out, test.url, test.from, test.to)
			text := out.String()
			if err != nil {
				text = err.Error()
			}
			t.Log(text)
			if ok := err == nil; ok != (test.accepted == 1) {
				t.Errorf("error: %v", err)
			}
			if err != nil && strings.Contains(text, "\n") {
				t.Errorf("more than one line: %q", text)
			}
			for _, words := range test.says {
				if !strings.Contains(text, words) {
					t.Errorf("%q does not contain %q", text, words)
				}
			}
			if got := relay.Stats().Accepted - before; got != test.accepted {
				t.Errorf("the relay accepted %d, want %d", got, test.accepted)
			}
		})
	}
}

func TestComposedMailIsRFC5322(t *testing.T) {
	for _, attachment := range [][]byte{nil, []byte("figures")} {
		m, err := compose("shop@example.com", "ann@example.org", "Ihre Bestellung für März", attachment)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := netmail.ReadMessage(bytes.NewReader(m.data))
		if err != nil {
			t.Fatal(err)
		}
		for _, field := range []string{"From", "To", "Subject", "Date", "Message-Id", "List-Unsubscribe", "Mime-Version", "Content-Type"} {
			if parsed.Header.Get(field) == "" {
				t.Errorf("no %s", field)
			}
		}
		for line := range bytes.Lines(m.data) {
			if !bytes.HasSuffix(line, []byte("\r\n")) || len(line) > 998 {
				t.Errorf("line %q", line)
			}
		}
	}
}
