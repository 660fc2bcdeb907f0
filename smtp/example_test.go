package smtp_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/textproto"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtp"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Only the import line differs from a program that uses net/smtp.
func ExampleSendMail() {
	relay := smtptest.NewUnstartedServer() // stands for mail.example.com:587
	relay.NoTLS = true
	relay.Start()
	defer relay.Close()

	auth := smtp.PlainAuth("", relay.Username, relay.Password, "127.0.0.1")
	msg := []byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: hi\r\nMessage-ID: <1@example.com>\r\n" +
		"List-Unsubscribe: <https://example.com/unsubscribe>\r\n\r\nThis is the body.\r\n")
	for range 3 {
		if err := smtp.SendMail(relay.Addr(), auth, "shop@example.com", []string{"ann@example.org"}, msg); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(len(relay.Messages()), "messages,", len(relay.Conns()), "connection")
	// Output: 3 messages, 1 connection
}

// What the relay has refused is a *textproto.Error, as with net/smtp.
func ExampleSendMail_refused() {
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS, relay.NoAuth = true, true
	relay.Start()
	defer relay.Close()
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"})

	err := smtp.SendMail(relay.Addr(), nil, "shop@example.com", []string{"nobody@example.org"}, []byte("Subject: hi\r\n\r\nhi\r\n"))
	if protoErr, ok := err.(*textproto.Error); ok {
		fmt.Println("refused:", protoErr.Code, protoErr.Msg)
	} else if e, ok := errors.AsType[*smtprelay.Error](err); ok && e.Outcome == smtprelay.Unknown {
		fmt.Println("the relay may have accepted it")
	}
	// Output: refused: 550 5.1.1 no such user
}

// A program that ends says QUIT to the relay before.
func ExampleShutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(smtp.Shutdown(ctx))
	// Output: <nil>
}

// An Auth that was written for net/smtp serves a smtprelay.Client too.
func ExampleSASL() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	username, password := cfg.Username, cfg.Password
	cfg.Username, cfg.Password = "", ""
	cfg.Auth = smtp.SASL(func(s smtprelay.ServerInfo) (smtp.Auth, error) {
		return smtp.PlainAuth("", username, password, s.Name), nil
	})
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client.Ping(context.Background()))
	// Output: <nil>
}
