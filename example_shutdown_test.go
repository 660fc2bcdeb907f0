package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// The end of a program: take no more, finish what is under way, say QUIT, and do not wait for ever.
func ExampleClient_Shutdown() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	msg := []byte("Subject: hello\r\n\r\nHello.\r\n")
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, msg))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fmt.Println(client.Shutdown(ctx))

	err = client.SendMail("shop@example.com", []string{"bob@example.org"}, msg)
	fmt.Println(errors.Is(err, smtprelay.ErrClosed), smtprelay.SafeToRetry(err))
	// Output:
	// <nil>
	// <nil>
	// true true
}
