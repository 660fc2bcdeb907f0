// Examples of Config.Auth.
package smtprelay_test

import (
	"context"
	"fmt"
	"log"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// tokens stands for what hands out OAuth tokens, such as an oauth2.TokenSource.
type tokens struct{}

func (tokens) Token(context.Context) (string, error) { return "ya29.token", nil }

// OAuth: Auth is asked once for each connection, so that the token it returns is always a fresh one.
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

// A key that is replaced while the program runs: each new connection takes the present one, and those that are open go on.
func ExampleConfig_rotatingKey() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	user, key := cfg.Username, cfg.Password // really: read from where the key is kept, each time
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
