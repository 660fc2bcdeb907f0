// Examples of what a service does with a Client, from sending to errors, AUTH and Trace. The example of bodies is in a separate
// file, so that go doc shows its type too.
package smtprelay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// order is the mail of most examples. Programs build theirs with a library such as go-mail.
var order = []byte("From: The Shop <shop@example.com>\r\n" +
	"To: ann@example.org\r\n" +
	"Subject: Your order\r\n" +
	"Date: Mon, 30 Nov 2026 10:00:00 +0000\r\n" +
	"Message-ID: <order-4711@example.com>\r\n" + // stable, to search the relay's log for
	"List-Unsubscribe: <https://example.com/unsubscribe?order=4711>\r\n" +
	"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" +
	"\r\n" +
	"It is ready.\r\n")

// A mail to one recipient. A program creates one Client, at its start, and shares it.
func ExampleClient_Send() {
	relay := smtptest.NewServer() // instead of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config()) // in production: smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")}
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(order),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(receipt.Reply.Code, receipt.Recipients[0].To, receipt.Recipients[0].Outcome)
	fmt.Println("same queue ID at the relay:", receipt.QueueID == relay.Messages()[0].ID)
	// Output:
	// 250 ann@example.org accepted
	// same queue ID at the relay: true
}

// A mail to each of many recipients, as many at a time as the connections can carry. The messages are created as needed, and
// results come in the order of completion.
func ExampleClient_SendAll() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	readers := []string{"ann@example.org", "bob@example.org", "gone@example.org", "eve@example.org"}
	messages := func(yield func(smtprelay.Message) bool) {
		for _, to := range readers {
			text := "From: news@example.com\r\nTo: " + to + "\r\nSubject: News\r\nMessage-ID: <news-1." + to + ">\r\n" +
				"List-Unsubscribe: <https://example.com/unsubscribe?address=" + url.QueryEscape(to) + ">\r\n\r\nThere is news.\r\n"
			if !yield(smtprelay.Message{
				From: "news@example.com",
				To:   []string{to},
				Body: smtprelay.Bytes([]byte(text)),
			}) {
				return
			}
		}
	}
	var lines []string
	for r := range client.SendAll(context.Background(), messages) {
		if r.Err != nil {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": ", r.Err))
		} else {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": accepted"))
		}
	}
	slices.Sort(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
	// Output:
	// ann@example.org: accepted
	// bob@example.org: accepted
	// eve@example.org: accepted
	// gone@example.org: smtprelay: RCPT TO <gone@example.org>: 550 5.1.1 "no such user"
}

// At the start of a service: find a wrong address or key now, not at the first mail.
func ExampleClient_Ping() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Password = "yesterday's key"
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // a relay may never reply
	defer cancel()
	err = client.Ping(ctx)
	var e *smtprelay.Error
	if errors.As(err, &e) {
		fmt.Println(e.Op, e.Reply.Code, e.Scope)
	}
	// Output:
	// auth 535 relay
}

// The end of a program: accept no more messages, finish those in progress, send QUIT, and do not wait for ever.
func ExampleClient_Shutdown() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, order))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fmt.Println(client.Shutdown(ctx))

	err = client.SendMail("shop@example.com", []string{"bob@example.org"}, order)
	fmt.Println(errors.Is(err, smtprelay.ErrClosed), smtprelay.ShouldRetry(err))
	// Output:
	// <nil>
	// <nil>
	// true true
}

// A service with one setting for its mail.
func ExampleParseURL() {
	cfg, err := smtprelay.ParseURL("smtps://apikey:SG.secret@smtp.sendgrid.net:465?max_conns=4")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(cfg.Addr, cfg.Username, cfg.Limits.MaxConns)
	fmt.Println(cfg.TLS == smtprelay.TLSImplicit)
	// Output:
	// smtp.sendgrid.net:465 apikey 4
	// true
}

// How a service handles an error: its Outcome says whether the message may be sent again, and to whom.
func ExampleError() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{
		"gone@example.org": "550 5.1.1 no such user",
		"full@example.org": "452 4.2.2 mailbox full",
	}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	send := func(to ...string) {
		receipt, err := client.Send(context.Background(), smtprelay.Message{
			From: "shop@example.com",
			To:   to,
			Body: smtprelay.Bytes(order),
		})
		var e *smtprelay.Error
		switch {
		case err == nil:
			fmt.Println("accepted for all, code", receipt.Reply.Code)
		case !errors.As(err, &e) || e.Outcome == smtprelay.Unknown:
			fmt.Println("perhaps accepted: a person decides")
		case e.Outcome == smtprelay.Accepted:
			for _, r := range e.Recipients {
				if r.Outcome != smtprelay.Accepted {
					fmt.Println("accepted, but not for", r.To, "who got", r.Reply.Code)
				}
			}
		case smtprelay.ShouldRetry(err):
			fmt.Println("later:", e.Reply.Code)
		default:
			fmt.Println("never:", e.Reply.Code)
		}
	}
	send("ann@example.org")
	send("ann@example.org", "gone@example.org")
	send("full@example.org")
	send("gone@example.org")

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Drop: true}) // the connection is lost before the reply
	send("ann@example.org")
	// Output:
	// accepted for all, code 250
	// accepted, but not for gone@example.org who got 550
	// later: 452
	// never: 550
	// perhaps accepted: a person decides
}

// A relay with greylisting refuses the first try of each new recipient with a 4xx reply. By default the caller gets this error
// and decides how long to wait; with On4xx the client retries by itself.
func ExampleRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 greylisted, try again"})

	cfg := relay.Config()
	cfg.Retry = smtprelay.Retry{
		On4xx:       true,
		MaxAttempts: 3,
		MinBackoff:  time.Millisecond, // in production: minutes, for greylisting, since the wait is a random part of it
		MaxBackoff:  10 * time.Millisecond,
	}
	cfg.Trace = &smtprelay.Trace{
		Retry: func(_ context.Context, r smtprelay.RetryInfo) {
			fmt.Printf("try %d failed: %v\n", r.Attempt, r.Err)
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(order),
	})
	fmt.Println(receipt.Reply.Code, err)
	// Output:
	// try 1 failed: smtprelay: RCPT TO <ann@example.org>: 451 4.7.1 "greylisted, try again"
	// 250 <nil>
}

// ShouldRetry decides whether a message goes back into a queue.
func ExampleShouldRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	m := smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(order),
	}

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 try again later"})
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.ShouldRetry(err), err)

	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true}) // accepted, and lost before the reply
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.ShouldRetry(err), smtprelay.OutcomeOf(err))
	fmt.Println("at the relay:", relay.Stats().Accepted)
	// Output:
	// true smtprelay: end of the message: 451 4.3.0 "try again later"
	// false unknown
	// at the relay: 1
}

// tokens stands for a source of OAuth tokens, such as an oauth2.TokenSource.
type tokens struct{}

func (tokens) Token(context.Context) (string, error) { return "ya29.token", nil }

// OAuth: Auth is called for each connection, so it can return a fresh token each time.
func ExampleConfig_auth() {
	var source tokens
	relay := smtptest.NewUnstartedServer()
	relay.Mechanisms = []string{sasl.OAuthBearer}
	relay.SASL = func(string) (smtptest.SASLServer, error) {
		return sasl.NewOAuthBearerServer(func(opts sasl.OAuthBearerOptions) *sasl.OAuthBearerError {
			fmt.Println("relay:", opts.Username, opts.Token)
			return nil
		}), nil
	}
	relay.Start()
	defer relay.Close()

	cfg := relay.Config()
	cfg.Username, cfg.Password = "", ""
	cfg.Auth = func(ctx context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		token, err := source.Token(ctx)
		if err != nil {
			return nil, err
		}
		return sasl.NewOAuthBearerClient(&sasl.OAuthBearerOptions{Username: "shop@example.com", Token: token}), nil
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println("ping:", client.Ping(context.Background()))
	// Output:
	// relay: shop@example.com ya29.token
	// ping: <nil>
}

// A key that is replaced while the program runs: new connections use the current one, and open connections continue.
func ExampleConfig_rotatingKey() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	user, key := cfg.Username, cfg.Password // in production: read from the store of the key, each time
	cfg.Username, cfg.Password = "", ""
	cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		return sasl.NewPlainClient("", user, key), nil
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client.Ping(context.Background()))
	// Output:
	// <nil>
}

// Counting and timing: hooks get the context of their Send, so they can record a span.
func ExampleTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Trace = &smtprelay.Trace{
		DialDone: func(_ context.Context, d smtprelay.DialDoneInfo) {
			fmt.Println("connection", d.Conn, "ready:", d.Err == nil)
		},
		SendDone: func(_ context.Context, s smtprelay.SendDoneInfo) {
			fmt.Println("sent to", s.Message.To, "error:", s.Err)
			_ = s.Took // for a histogram
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, to := range []string{"ann@example.org", "bob@example.org"} {
		_ = client.SendMail("shop@example.com", []string{to}, order)
	}
	// Output:
	// connection 1 ready: true
	// sent to [ann@example.org] error: <nil>
	// sent to [bob@example.org] error: <nil>
}

// LogTrace logs what an operator should see and, at debug level, the dialogue: without secrets and bodies.
func ExampleLogTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	var logged bytes.Buffer // in production: os.Stderr
	cfg := relay.Config()
	cfg.Trace = smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, order))
	client.Close()

	for _, words := range []string{`line="AUTH PLAIN [redacted]"`, `line="RCPT TO:<ann@example.org>"`, `msg="smtp message accepted"`, "It is ready."} {
		fmt.Println(words, strings.Contains(logged.String(), words))
	}
	// Output:
	// <nil>
	// line="AUTH PLAIN [redacted]" true
	// line="RCPT TO:<ann@example.org>" true
	// msg="smtp message accepted" true
	// It is ready. false
}
