// A relay that echoes what it received: echoes of the credentials must not become visible.
package test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"unicode"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
)

// runsOf returns the runs of twelve characters of a secret, and of its base64, that must not become visible.
func runsOf(secret string, responses ...string) map[string]bool {
	forms := []string{secret, hex.EncodeToString([]byte(secret))}
	for _, s := range append(responses, secret) { // a response as text contains the user's name, which may be shown
		forms = append(forms, base64.RawStdEncoding.EncodeToString([]byte(s)))
	}
	runs := map[string]bool{}
	for _, form := range forms {
		form = squeezed(form)
		for i := 0; i+12 <= len(form); i++ {
			runs[form[i:i+12]] = true
		}
	}
	return runs
}

// squeezed is text in lower case, without white space; redacted parts still separate their neighbours.
func squeezed(text string) string {
	text = strings.ReplaceAll(text, "[redacted]", "\x00")
	return strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return unicode.ToLower(r)
	}, text)
}

// shownOf returns a run that text contains.
func shownOf(runs map[string]bool, text string) string {
	text = squeezed(text)
	for i := 0; i+12 <= len(text); i++ {
		if runs[text[i:i+12]] {
			return text[i : i+12]
		}
	}
	return ""
}

// echoer is a relay that replies to each command positively or not, and echoes what it received in AUTH.
type echoer struct {
	secrets []string // the first is the key, the others are responses
	given   atomic.Bool
	echoes  atomic.Int64
}

// echo returns a part of a secret, encoded, folded and spaced as a hostile relay might do.
func (e *echoer) echo(code int) string {
	e.echoes.Add(1)
	s := e.secrets[rand.N(len(e.secrets))]
	switch rand.N(6) {
	case 0:
		s = base64.StdEncoding.EncodeToString([]byte(s))
	case 1:
		s = base64.StdEncoding.EncodeToString([]byte("xyz"[:rand.N(3)] + s))
	case 2:
		s = hex.EncodeToString([]byte(s))
	}
	if rand.N(2) == 0 {
		from := rand.N(len(s))
		s = s[from:min(len(s), from+8+rand.N(40))]
	}
	switch rand.N(6) {
	case 0:
		s = strings.ToUpper(s)
	case 1:
		s = strings.ToLower(s)
	case 2:
		s = strings.Join(strings.Split(s, ""), " ")
	}
	words := []string{"no ", "Ok: queued as ", "5.7.8 ", "", "unknown command: AUTH PLAIN ", "id="}[rand.N(6)]
	reply := ""
	for rand.N(3) == 0 && len(s) > 1 {
		n := 1 + rand.N(len(s)-1)
		reply += fmt.Sprintf("%d-%s%s\n", code, words, s[:n])
		s, words = s[n:], ""
	}
	return reply + fmt.Sprintf("%d %s%s", code, words, s)
}

// answer is the relay's reply to a line.
func (e *echoer) answer(_ int, line string) string {
	code := 250
	switch verb, _, _ := strings.Cut(line, " "); verb {
	case "":
		if !e.given.Load() {
			return "220 relay"
		}
		code = 220 // on another connection
	case "EHLO":
		keyword := ""
		if e.given.Load() {
			keyword = "250-X-" + e.secrets[0] + "\n"
		}
		return "250-relay\n" + keyword + "250-PIPELINING\n250 AUTH PLAIN XOAUTH2 LOGIN"
	case "RCPT":
		code = []int{250, 250, 250, 550, 450, 452}[rand.N(6)]
	case "DATA":
		code = 354
		if rand.N(8) == 0 {
			code = 554
		}
	case ".":
		code = []int{250, 250, 250, 554, 451}[rand.N(5)]
	case "MAIL", "RSET", "QUIT":
		if rand.N(20) == 0 {
			code = []int{421, 550, 354}[rand.N(3)]
		}
	default: // AUTH or, after AUTH LOGIN, which has the user's name, the password
		if strings.HasPrefix(line, "AUTH LOGIN") {
			return "334 UGFzc3dvcmQ6"
		}
		e.given.Store(true)
		code = []int{235, 235, 235, 235, 235, 235, 535, 454}[rand.N(8)]
	}
	answer := e.echo(code)
	if line == "" {
		return answer
	}
	switch rand.N(40) {
	case 0:
		answer = answer[2:] // malformed
	case 1:
		answer += "\n" + e.echo(250) // unexpected
	case 2:
		answer += "\n" + e.echo(421)
	}
	return answer
}

var echoes = flag.Int64("echoes", 5000, "echoes of TestEchoesOfTheCredentialsAreNotShown")

func TestEchoesOfTheCredentialsAreNotShown(t *testing.T) {
	for name, auth := range map[string]func(ctx context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error){
		"password": nil,
		"Config.Auth, PLAIN": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewPlainClient("", secretUser, secretKey), nil
		},
		"Config.Auth, LOGIN": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewLoginClient(secretUser, secretKey), nil
		},
		"Config.Auth, a bearer token": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return bearer{}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			relay := &echoer{secrets: []string{secretKey}}
			switch name {
			case "password", "Config.Auth, PLAIN":
				relay.secrets = append(relay.secrets, "\x00"+secretUser+"\x00"+secretKey)
			case "Config.Auth, a bearer token":
				relay.secrets = append(relay.secrets, bearerResponse)
			}
			runs := runsOf(relay.secrets[0], relay.secrets[1:]...)
			var mu sync.Mutex // guards shown
			shown := 0
			see := func(what, text string) {
				mu.Lock()
				defer mu.Unlock()
				if run := shownOf(runs, text); run != "" {
					if shown++; shown <= 5 {
						t.Errorf("%s shows %q: %q", what, run, text)
					}
				}
			}
			seeReply := func(what string, r smtprelay.Reply) { see(what, r.Message) }
			var logged lockedBuffer
			log := smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
			trace := *log
			trace.Reply = func(ctx context.Context, r smtprelay.ReplyInfo) {
				seeReply("Trace.Reply", r.Reply)
				see("Reply.String", r.Reply.String())
				log.Reply(ctx, r)
			}
			trace.ConnClosed = func(ctx context.Context, c smtprelay.ConnClosedInfo) {
				see("ConnClosedInfo", fmt.Sprint(c.Err))
				log.ConnClosed(ctx, c)
			}
			trace.DialDone = func(ctx context.Context, d smtprelay.DialDoneInfo) {
				see("DialDoneInfo", fmt.Sprintf("%v", d))
				log.DialDone(ctx, d)
			}
			for relay.echoes.Load() < *echoes/4 && !t.Failed() {
				synctest.Test(t, func(t *testing.T) {
					relay.given.Store(false) // nothing from this Client yet
					cfg := smtprelay.Config{
						Addr: "relay.example:25", TLS: smtprelay.TLSNone, AllowInsecureAuth: true, LocalName: "client.example", Dial: relaytest.Dial(0, relay.answer), Auth: auth, Trace: &trace,
						Retry: smtprelay.Retry{MaxAttempts: 1}, Limits: smtprelay.Limits{MaxConns: 2},
					}
					if auth == nil {
						cfg.Username, cfg.Password = secretUser, secretKey
					}
					client, err := smtprelay.New(cfg)
					if err != nil {
						t.Fatal(err)
					}
					for range 20 {
						receipt, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example", "c@y.example"}, Body: smtprelay.Bytes([]byte("x\r\n"))})
						see("QueueID", receipt.QueueID)
						seeReply("Receipt", receipt.Reply)
						for _, r := range receipt.Recipients {
							seeReply("RecipientResult", r.Reply)
							see("RecipientResult", r.QueueID)
						}
						if e, ok := errors.AsType[*smtprelay.Error](err); ok {
							see("Error", e.Error())
							seeReply("Error.Reply", e.Reply)
							for _, r := range e.Recipients {
								seeReply("Error.Recipients", r.Reply)
							}
							if strings.ContainsAny(e.Error(), "\r\n\x1b\x00") {
								t.Errorf("not one line: %q", e.Error())
							}
							if e.Op == smtprelay.OpAuth || e.Op == smtprelay.OpWait {
								break // the credentials are paused
							}
						}
					}
					client.Close()
					for line := range strings.SplitSeq(logged.String(), "\n") {
						see("LogTrace", line)
					}
					logged.reset()
				})
			}
		})
	}
}

const bearerResponse = "user=" + secretUser + "\x01auth=Bearer " + secretKey + "\x01\x01"

// bearer is XOAUTH2.
type bearer struct{}

func (bearer) Start() (string, []byte, error) { return "XOAUTH2", []byte(bearerResponse), nil }

// Next puts the challenge into its error, as mechanisms do.
func (bearer) Next(challenge []byte) ([]byte, error) {
	return nil, fmt.Errorf("token refused: %s", challenge)
}

func TestTokenInTheChallengeOfItsRefusalIsNotShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, AllowInsecureAuth: true, Retry: smtprelay.Retry{MaxAttempts: 1},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return bearer{}, nil },
			Dial: relaytest.Dial(0, func(_ int, line string) string {
				switch {
				case line == "" || strings.HasPrefix(line, "EHLO"):
					return relaytest.Agree("250 AUTH XOAUTH2", line)
				case strings.HasPrefix(line, "AUTH"):
					return "334 " + base64.StdEncoding.EncodeToString([]byte(`{"status":"401\n\u001b","token":"`+secretKey+`"}`+"\n\x1b"))
				}
				return "535 5.7.8 " + strings.ToUpper(secretKey)
			}),
		})
		_, err := client.Send(t.Context(), numbered(0))
		if run := shownOf(runsOf(secretKey), fmt.Sprint(err)); run != "" || !strings.Contains(fmt.Sprint(err), "[redacted]") || strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("got %v", err)
		}
	})
}
