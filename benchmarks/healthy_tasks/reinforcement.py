"""Tasks of reinforcement learning: the data come from the policy, and the loss says little."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from healthy_tasks.task import Batch, Healthy, mlp, task

CELLS = 9
GOAL = CELLS - 1
HORIZON = 20


def walk(policy: Any, games: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plays games in a corridor from its left end: cells, moves and rewards, each (time, games).

    A move to the right fails one time in ten; the goal pays 10 and starts a new episode, each step costs 0.1.
    """
    cell, cells, moves, rewards = torch.zeros(games, dtype=torch.long), [], [], []
    for _ in range(HORIZON):
        with torch.no_grad():
            move = torch.distributions.Categorical(logits=policy(cell)).sample()
        cells.append(cell)
        moves.append(move)
        slipped = torch.rand(games) < 0.1
        step = torch.where(move == 1, 1 - slipped.long(), -1)
        cell = (cell + step).clamp(0, GOAL)
        rewards.append(10.0 * (cell == GOAL) - 0.1)
        cell = cell.masked_fill(cell == GOAL, 0)
    return torch.stack(cells), torch.stack(moves), torch.stack(rewards)


def returns(rewards: Tensor, discount: float = 0.95) -> Tensor:
    """The discounted sum of all later rewards."""
    total, sums = torch.zeros_like(rewards[0]), []
    for reward in rewards.flip(0):
        total = reward + discount * total
        sums.append(total)
    return torch.stack(sums).flip(0)


class Corridor(Healthy):
    """A policy in the corridor; the score is what it fails to earn of what is possible."""

    steps, learning_rate = 1000, 3e-3

    def build(self) -> None:
        self.actor, self.critic = mlp(CELLS, 2), mlp(CELLS, 1)

    def policy(self, cell: Tensor) -> Tensor:
        return self.actor(F.one_hot(cell, CELLS).float())

    def value(self, cell: Tensor) -> Tensor:
        return self.critic(F.one_hot(cell, CELLS).float())[..., 0]

    def draw(self, index: int, g: Generator) -> Batch:
        return (torch.tensor(index),)

    def score(self) -> float:
        torch.manual_seed(1)
        return 22.0 - float(walk(self.policy, 256)[2].sum(0).mean())


@task("reinforce", "policy gradients: a loss about zero, of both signs", steps=1000)
@task("reinforce_raw", "policy gradients with raw returns: their size grows as it learns", raw=True)
class Reinforce(Corridor):
    """Each batch is of the policy of the moment."""

    raw = False

    def training_step(self, batch: Batch, index: int) -> Tensor:
        cells, moves, rewards = walk(self.policy, 8)
        gains = returns(rewards)
        if not self.raw:
            gains = (gains - gains.mean()) / (gains.std() + 1e-3)
        choice = torch.distributions.Categorical(logits=self.policy(cells))
        return -(choice.log_prob(moves) * gains).mean() - 0.01 * choice.entropy().mean()


@task("actor_critic", "the critic's loss grows with the returns that the policy finds")
class ActorCritic(Corridor):
    """Advantages from a value network."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        cells, moves, rewards = walk(self.policy, 8)
        gains, values = returns(rewards), self.value(cells)
        advantage = (gains - values).detach()
        choice = torch.distributions.Categorical(logits=self.policy(cells))
        actor = -(choice.log_prob(moves) * advantage).mean() - 0.05 * choice.entropy().mean()
        return actor + 0.5 * F.mse_loss(values, gains)


@task("ppo", "a new rollout every 40 steps, on which the loss falls until the next")
@task("ppo_reward_change", "the same, and rewards ten times as large from half time on", change=True)
class PPO(Corridor):
    """Clipped policy gradients in several epochs over each rollout."""

    change, steps = False, 1600

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 40 == 0:
            cells, moves, rewards = walk(self.policy, 32)
            gains = returns(rewards * (10 if self.change and index >= 800 else 1))
            with torch.no_grad():
                before = self.policy(cells).log_softmax(-1).gather(-1, moves[..., None])[..., 0]
                advantage = gains - self.value(cells)
            advantage = (advantage - advantage.mean()) / advantage.std()
            self.rollout = [t.flatten() for t in (cells, moves, gains, before, advantage)]
        some = torch.randint(len(self.rollout[0]), (64,))
        cells, moves, gains, before, advantage = (t[some] for t in self.rollout)
        now = self.policy(cells).log_softmax(-1).gather(-1, moves[:, None])[:, 0]
        ratio = torch.exp(now - before)
        actor = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return actor + 0.1 * F.smooth_l1_loss(self.value(cells), gains)


@task("dqn", "Q-learning with a target network, copied every 100 steps: the loss jumps each time")
@task("dqn_rare_goal", "the same, and no reward for 200 steps: the loss rises from 0", warm=200, every=200)
class DQN(Corridor):
    """Learns from a replay buffer, in which rewards appear as the agent explores."""

    warm, every, learning_rate, steps = 0, 100, 1e-3, 1600

    def build(self) -> None:
        self.actor = mlp(CELLS, 2, 64)  # its outputs are values of moves
        self.target = copy.deepcopy(self.actor).requires_grad_(False)
        self.replay: list[Tensor] = []

    def policy(self, cell: Tensor) -> Tensor:
        return 3 * super().policy(cell)

    def explore(self) -> None:
        cells, moves, rewards = walk(self.policy, 8)
        after = torch.cat([cells[1:], cells[:1]])
        self.replay.append(torch.stack([cells[:-1], moves[:-1], rewards[:-1], after[:-1]]).flatten(1))
        self.replay = self.replay[-60:]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 10 == 0:
            self.explore()
            self.buffer = torch.cat(self.replay, dim=1)
        if index % self.every == 0:
            self.target.load_state_dict(self.actor.state_dict())
        some = self.buffer[:, torch.randint(self.buffer.shape[1], (64,))]
        if index < self.warm:  # the goal is not paid for yet
            some[2] = some[2].clamp(max=0)
        cells, moves, rewards, after = some
        with torch.no_grad():
            later = self.target(F.one_hot(after.long(), CELLS).float()).max(-1).values
        values = self.actor(F.one_hot(cells.long(), CELLS).float()).gather(1, moves.long()[:, None])[:, 0]
        return F.mse_loss(values, rewards + 0.9 * later)


@task("self_play", "Nim against a copy of itself, which catches up every 150 steps")
class SelfPlay(Healthy):
    """Who takes the last of 10 sticks wins; the score is how often it loses against chance."""

    steps, learning_rate = 1000, 5e-3

    def build(self) -> None:
        self.net = mlp(11, 3)
        self.opponent = copy.deepcopy(self.net).requires_grad_(False)

    def draw(self, index: int, g: Generator) -> Batch:
        return (torch.tensor(index),)

    def choose(self, net: Any, sticks: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(F.one_hot(sticks, 11).float())
        too_many = torch.arange(1, 4) > sticks.clamp(min=1)[:, None]
        choice = torch.distributions.Categorical(logits=logits.masked_fill(too_many, -1e9))
        move = choice.sample()
        return move + 1, choice.log_prob(move)

    def play(self, opponent: Any, games: int) -> tuple[Tensor, Tensor]:
        """Plays games; the log-probability of the own moves of each, and 1 or -1."""
        sticks, won = torch.randint(4, 11, (games,)), torch.zeros(games)
        total = torch.zeros(games)
        for turn in range(10):
            running = sticks > 0
            if not running.any():
                break
            taken, log_probability = self.choose(self.net if turn % 2 == 0 else opponent, sticks)
            if turn % 2 == 0:
                total = total + log_probability * running
            sticks = (sticks - taken).clamp(min=0)
            won = torch.where(running & (sticks == 0), 1.0 - 2 * (turn % 2), won)
        return total, won

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index % 150 == 0:
            self.opponent.load_state_dict(self.net.state_dict())
        total, won = self.play(self.opponent, 64)
        return -(total * (won - won.mean())).mean()

    def score(self) -> float:
        torch.manual_seed(1)
        _, won = self.play(lambda sticks: torch.zeros(len(sticks), 3), 1000)
        return float((won < 0).float().mean())
