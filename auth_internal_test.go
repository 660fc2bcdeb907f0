package smtprelay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/wire"
)

func TestLoginAnswersWhateverItIsAsked(t *testing.T) {
	for _, tt := range []struct {
		why     string
		prompts []string
		want    []string // one less than prompts: the last is an error
	}{
		{"the prompts of nearly all", []string{"Username:", "Password:"}, []string{"ann", "s3cret"}},
		{"other words", []string{"User Name\x00", "Password\x00"}, []string{"ann", "s3cret"}},
		{"no words at all", []string{"", ""}, []string{"ann", "s3cret"}},
		{"another language", []string{"Benutzer:", "Kennwort:"}, []string{"ann", "s3cret"}},
		{"the password is asked for first, and the name was not", []string{"Password:"}, []string{"s3cret"}},
		{"in lower case", []string{"password"}, []string{"s3cret"}},
		{"a third question has no answer", []string{"Username:", "Password:", "Realm:"}, []string{"ann", "s3cret"}},
		{"nor has a second one after the password", []string{"Username:", "Password:", "Password:"}, []string{"ann", "s3cret"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := &loginClient{username: "ann", password: newSecret("s3cret")}
			mechanism, ir, err := l.Start()
			if mechanism != "LOGIN" || ir != nil || err != nil {
				t.Errorf("Start: got %q, %q, %v, want LOGIN and no initial response", mechanism, ir, err)
			}
			for i, prompt := range tt.prompts {
				got, err := l.Next([]byte(prompt))
				if i < len(tt.want) {
					if string(got) != tt.want[i] || err != nil {
						t.Errorf("%q: got %q, %v, want %q", prompt, got, err, tt.want[i])
					}
				} else if got != nil || !errors.Is(err, sasl.ErrUnexpectedServerChallenge) {
					t.Errorf("%q: got %q, %v, want ErrUnexpectedServerChallenge", prompt, got, err)
				}
			}
			if got := fmt.Sprintf("%v %+v %#v", l, l, l); strings.Contains(got, "s3cret") {
				t.Errorf("it prints as %s", got)
			}
		})
	}
}

func TestWhatIsNoReplyToAuthIsNotQuoted(t *testing.T) {
	// Such a relay says back what it is told, as the echo service of old does. A key in base64 may be cut short there.
	key := "s3cret" + strings.Repeat("-key", 30)
	for _, tt := range []struct{ why, offer string }{
		{"PLAIN, alone", "250-relay\r\n250 AUTH PLAIN\r\n"},
		{"PLAIN, at the head of the first transaction", "250-relay\r\n250-PIPELINING\r\n250 AUTH PLAIN\r\n"},
		{"LOGIN", "250-relay\r\n250 AUTH LOGIN\r\n"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				echo := func(conn net.Conn) { // until the client closes
					defer conn.Close()
					io.WriteString(conn, "220 relay\r\n")
					for in := bufio.NewReader(conn); ; {
						line, err := in.ReadString('\n')
						switch {
						case err != nil:
							return
						case strings.HasPrefix(line, "EHLO"):
							line = tt.offer
						case strings.HasPrefix(line, "AUTH LOGIN"), line == "YW5u\r\n":
							line = "334 \r\n"
						}
						io.WriteString(conn, line)
					}
				}
				client, err := New(Config{
					Addr: "relay.example:25", TLS: TLSNone, AllowInsecureAuth: true, Username: "ann", Password: key, Retry: Retry{MaxAttempts: 1},
					Dial: func(context.Context, string, string) (net.Conn, error) {
						c, s := netpipe.New(0)
						go echo(s)
						return c, nil
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				_, err = client.Send(t.Context(), Message{From: "a@x.example", To: []string{"b@y.example"}, Body: Bytes([]byte("x"))})
				e, ok := errors.AsType[*Error](err)
				if !ok || e.Op != OpAuth || !errors.Is(err, wire.ErrMalformed) || OutcomeOf(err) != NotAccepted {
					t.Errorf("got %v, want that the reply to AUTH is malformed", err)
				}
				for _, piece := range []string{"s3cret", "czNjcmV0", "AGFubgBzM2NyZXQ"} {
					if strings.Contains(fmt.Sprint(err), piece) {
						t.Errorf("got %v, with the key in it", err)
					}
				}
			})
		})
	}
}
