// Here belong small services in the shape of real ones. But for the import line they are as they were for net/smtp.
package smtp_test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/smtprelay/smtprelay/smtp" // was "net/smtp"
	"github.com/smtprelay/smtprelay/smtptest"
)

// resetHandler mails a link to whoever has forgotten a password.
type resetHandler struct{ addr, user, password string }

func (h resetHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host, _, _ := net.SplitHostPort(h.addr)
	auth := smtp.PlainAuth("", h.user, h.password, host)
	to := r.FormValue("email")
	body := "To: " + to + "\r\nSubject: Your new password\r\n\r\nhttps://example.com/reset\r\n"
	err := smtp.SendMail(h.addr, auth, "noreply@example.com", []string{to}, []byte(body))
	if protoErr, ok := err.(*textproto.Error); ok && protoErr.Code == 550 {
		http.Error(w, "no such address", http.StatusUnprocessableEntity)
	} else if err != nil {
		http.Error(w, "try again", http.StatusServiceUnavailable)
	}
}

func TestPasswordResetHandler(t *testing.T) {
	relay, _ := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "nobody@example.org", Reply: "550 5.1.1 no such user"})
	site := httptest.NewServer(resetHandler{relay.Addr(), "ann", "s3cret"})
	defer site.Close()
	for email, want := range map[string]int{"ann@example.org": 200, "nobody@example.org": 422, "a\r\nDATA@example.org": 503} {
		resp, err := http.PostForm(site.URL, url.Values{"email": {email}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%q: got status %d, want %d", email, resp.StatusCode, want)
		}
	}
	got := relay.Messages()
	if len(got) != 1 || got[0].To[0] != "ann@example.org" || !bytes.Contains(got[0].Body, []byte("Subject: Your new password")) {
		t.Errorf("the relay got %+v", got)
	}
}

// alerter has SendMail as a value, so that its own tests can put another in its place.
type alerter struct {
	send func(addr string, a smtp.Auth, from string, to []string, msg []byte) error
	addr string
	auth smtp.Auth
}

func (a *alerter) fire(alert string) error {
	return a.send(a.addr, a.auth, "alerts@example.com", []string{"oncall@example.com"}, fmt.Appendf(nil, "Subject: %s\r\n\r\nIt is firing.\r\n", alert))
}

func TestAlertMailerWithSendMailAsAValue(t *testing.T) {
	relay, _ := newRelay(t)
	a := &alerter{send: smtp.SendMail, addr: relay.Addr(), auth: &loginAuth{username: "ann", password: "s3cret"}}
	var firing sync.WaitGroup
	for i := range 30 { // alerts come together; the 11th connection would be refused
		firing.Go(func() {
			if err := a.fire(fmt.Sprint("disk ", i)); err != nil {
				t.Error(err)
			}
		})
	}
	firing.Wait()
	if got := len(relay.Messages()); got != 30 || relay.Stats().MaxOpen > 10 {
		t.Errorf("got %d messages by %d connections at once, want 30 by 10", got, relay.Stats().MaxOpen)
	}
}

// A program that speaks to the relay itself keeps net/smtp's Client.
func TestClientIsNetSMTPs(t *testing.T) {
	relay, _ := newRelay(t)
	c, err := smtp.Dial(relay.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, step := range []func() error{
		func() error { return c.Hello("client.example") },
		func() error { return c.Auth(plain(relay)) },
		func() error { return c.Mail("a@x.example") },
		func() error { return c.Rcpt("b@y.example") },
		func() error {
			w, err := c.Data()
			if err == nil {
				if _, err = strings.NewReader(string(msg)).WriteTo(w); err == nil {
					err = w.Close()
				}
			}
			return err
		},
		c.Quit,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(relay.Messages()); got != 1 {
		t.Errorf("got %d messages", got)
	}
}
